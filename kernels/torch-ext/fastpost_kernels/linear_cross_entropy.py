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
from ._cross_entropy_walks import Objective, forward, plan
from ._device import resolve_backend
from ._linear_arguments import (
    check_outputs,
    check_tensors,
    resolve_settings,
    resolve_transform,
)
from ._namespace import add_op_namespace_prefix
from ._vocab_passes import LogitTransform
from ._vocab_tiles import IGNORE, TILE_COLS, Head, resident_size, statistics_dtype
from ._vocab_workspace import (
    HeadSize,
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
