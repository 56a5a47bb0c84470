"""Cross-entropy from hidden states and a language-model head, gradients computed in the forward.

    loss = 1/N sum_i [ (1 - eps) (-logprob_i) + eps (lse_i - mean_v z_iv) + zeta lse_i^2 ]
    d loss / d z_v = 1/N [ p_v (1 + 2 zeta lse) - (1 - eps) [v = t] - eps / V ]

Strategy. The loss is linear in what each row returns and its coefficients are known, so nothing
waits for the backward, which only multiplies by the incoming scalar.
  * frozen head, eps = 0: 2 GEMMs, as in `linear_logprob`.
  * otherwise, if the budget holds the scored rows' logits (M V s bytes): they are computed once, in
    tiles, turned into gradients in place and multiplied. 3 GEMMs (2 if the head is frozen); each
    slice of d weight is written once by its GEMM.
  * otherwise every tile is computed twice: 4 GEMMs, memory bounded by the budget.
Rejected: row chunks with 3 GEMMs and a full-precision [V, H] accumulator for d weight: its traffic
costs more than recomputing below about a thousand rows a chunk, and its 2.5 GB (V 151,936, H 4096)
would pay for the logits of 8,192 rows.

One head GEMM is 2 M H V FLOP.
Legend: M rows, N scored rows, H hidden, V vocabulary, s bytes per element of the compute dtype.
Sources: gradient-in-forward, Hsu et al., "Liger Kernel" (arXiv:2410.10989, section 3.2); z-loss,
Chowdhery et al., PaLM (arXiv:2204.02311, section 5); label smoothing, Szegedy et al.
(arXiv:1512.00567, section 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._cost import register_costs
from ._device import resolve_backend
from ._linear_arguments import (
    check_outputs,
    check_tensors,
    resolve_settings,
    resolve_transform,
)
from ._namespace import add_op_namespace_prefix
from ._vocab_passes import LogitTransform
from ._vocab_tiles import (
    IGNORE,
    TILE_COLS,
    Head,
    RowStatistics,
    ScoredRows,
    TileGradients,
    WeightTiles,
    combine_target,
    finish_state,
    fold_rows,
    gemm_rows,
    gradient_coefs,
    recompute_gradients,
    resident_size,
    resident_tile,
    scatter_rows,
    start_state,
    statistics_dtype,
    target_logits,
)
from ._vocab_workspace import (
    HeadSize,
    fold_plan,
    fold_workspace,
    recompute_workspace,
    resident_workspace,
)

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]

OUTPUTS = ("entropy", "is_top1")
NO_NEEDS = (False, False, False)


class LinearCrossEntropy(NamedTuple):
    """`loss` is a scalar with gradients; the others are [M] without, None unless asked for."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None


class Objective(NamedTuple):
    """What is summed over rows, and the factor of the sum (a scalar tensor)."""

    label_smoothing: float
    z_loss: float
    scale: Tensor

    def loss(self, found: RowStatistics) -> Tensor:
        rows = (self.label_smoothing - 1) * found.logprob
        if self.label_smoothing:
            rows = rows + self.label_smoothing * (found.logsumexp - found.mean_logits)
        if self.z_loss:
            rows = rows + self.z_loss * found.logsumexp.square()
        return rows.sum() * self.scale

    def coefs(self, head: Head, found: RowStatistics, slope: Tensor) -> Tensor:
        stats = torch.stack([found.logprob, found.logsumexp, found.entropy, slope])
        ones = torch.ones_like(found.logprob) * self.scale
        return gradient_coefs(
            stats,
            head.transform,
            grad_logprob=(self.label_smoothing - 1) * ones,
            grad_logsumexp=(self.label_smoothing + 2 * self.z_loss * found.logsumexp) * ones,
            uniform=-self.label_smoothing / head.weight.shape[0] * ones,
        )


def plan(
    rows: int, vocab: int, itemsize: int, smoothing: float, needs: tuple[bool, ...], budget: int
) -> str:
    """Which of the strategies runs: "fold", "frozen", "resident" or "recompute"."""
    if not any(needs):
        return "fold"
    if needs == (True, False, False) and smoothing == 0:
        return "frozen"
    return "resident" if resident_size(rows, vocab) * itemsize <= budget else "recompute"


class Folded(NamedTuple):
    """Every scored row's statistics, and the frozen head's d hidden."""

    statistics: RowStatistics
    slope: Tensor  # [m]
    d_hidden: Tensor | None  # [m, H]


def fold_all(
    head: Head, rows: ScoredRows, objective: Objective, outputs: Sequence[str], frozen: bool
) -> Folded:
    """Statistics by chunks of rows; with `frozen` also d loss / d h, from the same walk."""
    vocab, width = head.weight.shape
    chunk, cols = fold_plan(rows.count, vocab, width, head.compute_dtype, frozen, head.budget)
    tiles, buffer = WeightTiles(head, cols), head.empty(chunk, cols)
    d_hidden = head.hidden.new_empty(rows.count, width) if frozen else None
    found: list[RowStatistics] = []
    slopes = []
    for start, end in rows.chunks(chunk):
        hidden = gemm_rows(head, rows.take(head.hidden, start, end))
        targets = rows.take(head.targets, start, end).contiguous()
        target = target_logits(head, hidden, targets)
        state = start_state(head, target)
        acc = head.stats(end - start, width) if frozen else None
        fold_rows(
            head, hidden, targets, tiles, buffer, state, **_wanted(objective, outputs), acc=acc
        )
        one = finish_state(state, target, vocab)
        if acc is not None and d_hidden is not None:
            # scale (p_v A - [v = t]) z'_v W_v summed over v, with A = 1 + 2 zeta lse
            extra = 2 * objective.z_loss * one.logsumexp
            at_target = torch.expm1(one.logprob) + one.logprob.exp() * extra
            others = (1 + extra) * head.transform.chain / one.normalizer
            scale = objective.scale
            combine_target(target.weight, at_target * target.slope * scale, acc, others * scale)
            d_hidden[start:end] = acc
        found.append(one)
        slopes.append(target.slope)
    statistics = RowStatistics(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    return Folded(statistics, torch.cat(slopes), d_hidden)


def _wanted(objective: Objective, outputs: Sequence[str]) -> dict[str, bool]:
    return {
        "moments": "entropy" in outputs or objective.label_smoothing > 0,
        "top1": "is_top1" in outputs,
    }


def resident_gradients(
    head: Head,
    rows: ScoredRows,
    objective: Objective,
    outputs: Sequence[str],
    needs: tuple[bool, bool, bool],
) -> tuple[RowStatistics, TileGradients]:
    """All logits at once, [m, V] within the budget: folded, then turned into gradients in place."""
    vocab = head.weight.shape[0]
    buffer = head.empty(resident_size(rows.count, vocab))
    tiles = WeightTiles(head, TILE_COLS)
    hidden = gemm_rows(head, rows.take(head.hidden, 0, rows.count))
    targets = rows.take(head.targets, 0, rows.count).contiguous()
    target = target_logits(head, hidden, targets)
    state = start_state(head, target)
    wanted = _wanted(objective, outputs)
    fold_rows(head, hidden, targets, tiles, buffer, state, **wanted, resident=True)
    found = finish_state(state, target, vocab)
    coefs = objective.coefs(head, found, target.slope)
    grads = TileGradients(head, rows.count, TILE_COLS, rows.count, needs)
    for first, last in tiles.spans():
        tile = resident_tile(buffer, rows.count, first, last)
        bias = tiles.bias_slice(first, last)
        head.passes.gradient(tile, coefs, targets, first, bias, head.transform)
        grads.add(tile, tiles.slice(first, last), hidden, 0, first)
        grads.end_span(first, last)
    return found, grads


class ForwardResult(NamedTuple):
    """[M] statistics and the gradients of the loss; what is not needed is None."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    is_top1: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None


def forward(
    head: Head,
    objective: Objective,
    outputs: Sequence[str],
    needs: tuple[bool, bool, bool],
) -> ForwardResult:
    """Loss, statistics and gradients."""
    rows = ScoredRows(head.targets, head.weight.shape[0])
    if rows.count == 0:
        return _no_rows(head, needs)
    strategy = plan(
        rows.count,
        head.weight.shape[0],
        head.compute_dtype.itemsize,
        objective.label_smoothing,
        needs,
        head.budget,
    )
    d_hidden: Tensor | None = None
    grads: TileGradients | None = None
    if strategy == "resident":
        found, grads = resident_gradients(head, rows, objective, outputs, needs)
    else:
        found, slope, d_hidden = fold_all(head, rows, objective, outputs, strategy == "frozen")
        if strategy == "recompute":
            grads = recompute_gradients(head, rows, objective.coefs(head, found, slope), needs)
    if grads is not None:
        d_hidden = grads.hidden
    return ForwardResult(
        objective.loss(found),
        scatter_rows(rows, found.logprob, head.stats_dtype),
        scatter_rows(rows, found.entropy, head.stats_dtype),
        scatter_rows(rows, found.is_top1, torch.bool),
        None if d_hidden is None else scatter_rows(rows, d_hidden, head.hidden.dtype),
        None if grads is None else grads.weight,
        None
        if grads is None or grads.bias is None or head.bias is None
        else grads.bias.to(head.bias.dtype),
    )


def _no_rows(head: Head, needs: tuple[bool, bool, bool]) -> ForwardResult:
    zeros = [
        torch.zeros_like(x, memory_format=torch.contiguous_format)
        if need and x is not None
        else None
        for need, x in zip(needs, (head.hidden, head.weight, head.bias), strict=True)
    ]
    rows = head.hidden.shape[0]
    top1 = head.hidden.new_zeros(rows, dtype=torch.bool)
    return ForwardResult(head.stats(), head.stats(rows), head.stats(rows), top1, *zeros)


@torch.library.custom_op(add_op_namespace_prefix("linear_cross_entropy_fwd"), mutates_args=())
def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,  # comma-separated names
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logprob, entropy, is_top1, d hidden, d weight, d bias; absent ones have no elements."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    backend = resolve_backend(backend, hidden.device, compute_dtype)
    head = Head(hidden, weight, bias, targets, transform, backend, compute_dtype, memory_budget)
    objective = Objective(label_smoothing, z_loss, scale.to(head.stats_dtype))
    names = outputs.split(",")
    with torch.cuda.device_of(hidden):
        found = forward(head, objective, names, (need_hidden, need_weight, need_bias))
    empty = hidden.new_empty
    return (
        found.loss,
        found.logprob,
        found.entropy if "entropy" in names else empty(0, dtype=head.stats_dtype),
        found.is_top1 if "is_top1" in names else empty(0, dtype=torch.bool),
        empty(0) if found.d_hidden is None else found.d_hidden,
        weight.new_empty(0) if found.d_weight is None else found.d_weight,
        (weight if bias is None else bias).new_empty(0) if found.d_bias is None else found.d_bias,
    )


@linear_cross_entropy_fwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> tuple[Tensor, ...]:
    rows, wide, names = hidden.shape[0], statistics_dtype(compute_dtype), outputs.split(",")
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(rows, dtype=wide),
        hidden.new_empty(rows if "entropy" in names else 0, dtype=wide),
        hidden.new_empty(rows if "is_top1" in names else 0, dtype=torch.bool),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[4:])
    ctx.set_materialize_grads(False)


def _scaled(saved: Tensor, grad: Tensor) -> Tensor:
    """saved * grad. On CPU a grad of exactly 1, the usual case, hands over `saved` itself if the
    graph is not kept: copying [V, H] costs as much as a GEMM there. Tensors of tracers and fake
    modes are subclasses and always multiply."""
    plain = type(grad) is Tensor and grad.device.type == "cpu"
    if plain and not torch._C._autograd._get_current_graph_task_keep_graph() and grad.item() == 1:
        return saved
    return saved * grad


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss = grads[0]
    unused = (None,) * 13
    if grad_loss is None:
        return (None, None, None, None, *unused)
    d_hidden, d_weight, d_bias = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    return (
        _scaled(d_hidden, grad_loss) if need_hidden else None,
        _scaled(d_weight, grad_loss) if need_weight else None,
        None,
        _scaled(d_bias, grad_loss) if need_bias else None,
        *unused,
    )


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup_context)


def _flops(hidden: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    smoothing, needs, settings = args[3], tuple(args[9:12]), args[12:]
    _, compute_dtype, budget = settings
    strategy = plan(hidden[0], weight[0], compute_dtype.itemsize, smoothing, needs, budget)
    gemms = 1 + needs[0] + needs[1] + (strategy == "recompute")
    return 2 * hidden[0] * weight[0] * weight[1] * gemms


def _workspace(hidden: Tensor, weight: Tensor, *args: Any) -> int:
    smoothing, needs, (backend, dtype, budget) = args[3], tuple(args[9:12]), args[12:]
    size = HeadSize.of(hidden, weight, backend, dtype, budget)
    strategy = plan(size.rows, size.vocab, dtype.itemsize, smoothing, needs, budget)
    if strategy == "resident":
        logits = resident_size(size.rows, size.vocab)
        return resident_workspace(size, logits, TILE_COLS, needs)
    fold = fold_workspace(size, dtype, strategy == "frozen")
    if strategy == "frozen":
        return fold + size.rows * size.width * size.hidden_bytes
    if strategy == "recompute":
        return max(fold, recompute_workspace(size, needs))
    return fold


register_costs(linear_cross_entropy_fwd, flops=_flops, workspace=_workspace)


def linear_cross_entropy(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [M] int64
    bias: Tensor | None = None,  # [V]
    *,
    loss_mask: Tensor | None = None,  # [M] bool, True = scored
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items: int | float | Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = (),
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> LinearCrossEntropy:
    """Cross-entropy of a language-model head without the [M, V] logits.

    Equals, without the [M, V] tensor (`z` as in `linear_logprob`):

        loss = F.cross_entropy(z, targets, label_smoothing=label_smoothing, reduction="sum")
        loss = (loss + z_loss * z.logsumexp(-1)[targets != -100].square().sum()) / num_items

    Args:
        hidden, weight, targets, bias, temperature, softcap, logit_scale, backend, compute_dtype:
            as in `linear_logprob`.
        loss_mask: [M] bool; rows that are False are not scored, like targets of -100.
        label_smoothing: in [0, 1), spread evenly over the vocabulary.
        z_loss: weight of logsumexp^2, >= 0.
        num_items: what "mean" divides by, a number or a scalar tensor (the tokens of a whole
            gradient accumulation, say); default the number of scored rows, at least 1.
        reduction: "mean" or "sum".
        outputs: names out of "entropy" and "is_top1".
        memory_budget: bytes for logits. If it holds all scored rows' (M V elements of the compute
            dtype), three GEMMs suffice with a trained head; below that, four. Default 128 MiB on
            CPU, 512 MiB on GPUs.

    Returns:
        `LinearCrossEntropy`; `loss` is 0 and differentiable if no row is scored. Gradients are held
        from forward to backward: [M, H], [V, H] and [V] where needed.

    Raises:
        ValueError, TypeError: as `linear_logprob`, and for arguments out of the ranges above.
    """
    check_tensors(hidden, weight, targets, bias)
    check_outputs(outputs, OUTPUTS)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be >= 0, got {z_loss}")
    if loss_mask is not None:
        if loss_mask.dtype != torch.bool or loss_mask.shape != targets.shape:
            raise ValueError(
                f"loss_mask must be a bool tensor [M] = [{targets.shape[0]}], got "
                f"{loss_mask.dtype} {tuple(loss_mask.shape)}"
            )
        targets = targets.where(loss_mask, IGNORE)
    transform = resolve_transform(logit_scale, softcap, temperature)
    settings = resolve_settings(hidden, backend, compute_dtype, memory_budget)
    scale = _row_scale(targets, num_items, reduction, statistics_dtype(settings[1]))
    grad = torch.is_grad_enabled()
    found = linear_cross_entropy_fwd(
        hidden,
        weight,
        targets,
        bias,
        scale,
        float(label_smoothing),
        float(z_loss),
        *transform,
        ",".join(name for name in OUTPUTS if name in outputs),
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
        *settings,
    )
    loss, logprob, entropy, is_top1 = found[:4]
    return LinearCrossEntropy(
        loss,
        logprob.detach(),
        entropy.detach() if "entropy" in outputs else None,
        is_top1 if "is_top1" in outputs else None,
    )


def _row_scale(
    targets: Tensor, num_items: int | float | Tensor | None, reduction: str, dtype: torch.dtype
) -> Tensor:
    """What every row's loss is multiplied by, a scalar tensor."""
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction must be 'mean' or 'sum', got {reduction!r}; for losses per row use "
            "linear_logprob"
        )
    if reduction == "sum":
        if num_items is not None:
            raise ValueError("num_items divides the mean; with reduction='sum' leave it out")
        return torch.ones((), dtype=dtype, device=targets.device)
    if num_items is None:
        return (targets != IGNORE).sum().clamp(min=1).to(dtype).reciprocal()
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be a scalar, got shape {tuple(num_items.shape)}")
        return num_items.detach().reshape(()).to(targets.device, dtype).reciprocal()
    if not num_items > 0:
        raise ValueError(f"num_items must be positive, got {num_items}")
    return torch.full((), 1.0 / num_items, dtype=dtype, device=targets.device)
