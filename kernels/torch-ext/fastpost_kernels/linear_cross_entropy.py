"""Cross-entropy from hidden states and a language-model head, gradients computed in the forward.

    loss = 1/N sum_i [ (1 - eps) (-logprob_i) + eps (lse_i - mean_v z_iv) + zeta lse_i^2 ]
    d loss / d z_v = 1/N [ p_v (1 + 2 zeta lse) - (1 - eps) [v = t] - eps / V ]

Strategy. The loss is linear in what each row returns and its coefficients are known, so nothing
waits for the backward, which only multiplies by the incoming scalar.
  * frozen head, eps = 0: 2 GEMMs, as in `linear_logprob`.
  * otherwise, if the budget holds the scored rows' logits (M V s bytes): they are computed once, in
    tiles, turned into gradients in place and multiplied. 3 GEMMs (2 without d weight); each slice
    of d weight is written once by its GEMM.
  * without d weight (label smoothing on a frozen head, or a trained adapter) chunks of rows do, as
    long as the budget holds the logits of 512: sums over chunks are [V, r] or [V] at most. 2 GEMMs.
  * otherwise every tile is computed twice: 4 GEMMs (3 without d weight), memory bounded by the
    budget.
  * adapters and `filter_eps` as in `linear_logprob`. A filter also takes a frozen head to the
    second or third strategy: the GEMM of d hidden is then a share of one.
Rejected: row chunks with 3 GEMMs and a full-precision [V, H] accumulator for d weight: its traffic
costs more than recomputing below about a thousand rows a chunk, and its 2.5 GB (V 151,936, H 4096)
would pay for the logits of 8,192 rows.

One head GEMM is 2 M H V FLOP; thin ones are counted in `_vocab_flops.py`.
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
from ._cross_entropy_walks import Objective, forward, plan, resident_rows
from ._device import resolve_backend
from ._linear_arguments import (
    check_filter,
    check_outputs,
    check_tensors,
    make_lora,
    resolve_settings,
    resolve_transform,
)
from ._lora_head import LoraHead
from ._namespace import add_op_namespace_prefix
from ._vocab_flops import gradient_flops, head_flops
from ._vocab_gradients import HeadGradients, fake_results
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
# Places of hidden, weight, bias, lora_a and lora_b among the op's arguments.
DIFFERENTIABLE = (0, 1, 3, 5, 6)
NUM_ARGUMENTS = 23


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
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,  # comma-separated names
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_lora_a: bool,
    need_lora_b: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
    filter_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logprob, entropy, is_top1, d hidden, d weight, d bias, d lora_a, d lora_b; absent ones
    have no elements."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    backend = resolve_backend(backend, hidden.device, compute_dtype)
    lora = make_lora(lora_a, lora_b, lora_scale)
    settings = (backend, compute_dtype, memory_budget, lora, filter_eps)
    head = Head(hidden, weight, bias, targets, transform, *settings)
    objective = Objective(label_smoothing, z_loss, scale.to(head.stats_dtype))
    names = outputs.split(",")
    with torch.cuda.device_of(hidden):
        needs = (need_hidden, need_weight, need_bias)
        found = forward(head, objective, names, needs, (need_lora_a, need_lora_b))
    arguments = HeadGradients(hidden, weight, bias, lora_a, lora_b)
    return (
        found.loss,
        found.logprob,
        found.entropy if "entropy" in names else hidden.new_empty(0, dtype=head.stats_dtype),
        found.is_top1 if "is_top1" in names else hidden.new_empty(0, dtype=torch.bool),
        *found.gradients.as_results(arguments),
    )


@linear_cross_entropy_fwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_lora_a: bool,
    need_lora_b: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
    filter_eps: float | None,
) -> tuple[Tensor, ...]:
    rows, wide, names = hidden.shape[0], statistics_dtype(compute_dtype), outputs.split(",")
    needs = (need_hidden, need_weight, need_bias, need_lora_a, need_lora_b)
    arguments = HeadGradients(hidden, weight, bias, lora_a, lora_b)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(rows, dtype=wide),
        hidden.new_empty(rows if "entropy" in names else 0, dtype=wide),
        hidden.new_empty(rows if "is_top1" in names else 0, dtype=torch.bool),
        *fake_results(arguments, needs),
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
    gradients: list[Tensor | None] = [None] * NUM_ARGUMENTS
    if grad_loss is None:
        return tuple(gradients)
    for place, saved in zip(DIFFERENTIABLE, ctx.saved_tensors, strict=True):
        if ctx.needs_input_grad[place]:
            gradients[place] = _scaled(saved, grad_loss)
    return tuple(gradients)


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup_context)


def _flops(hidden: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    # args: targets, bias, scale, lora_a, lora_b, lora_scale, label_smoothing, ...
    lora_a, smoothing, needs = args[3], args[6], tuple(args[12:17])
    _, dtype, budget, filter_eps = args[17:]
    filtered = filter_eps is not None
    strategy = plan(hidden[0], weight[0], dtype.itemsize, smoothing, needs, budget, filtered)
    head = head_flops(hidden, weight, lora_a)
    if strategy == "frozen":
        return 2 * head
    return head * (1 + (strategy == "recompute")) + gradient_flops(hidden, weight, lora_a, needs)


def _workspace(hidden: Tensor, weight: Tensor, *args: Any) -> int:
    lora_a, smoothing, needs = args[3], args[6], tuple(args[12:17])
    backend, dtype, budget, filter_eps = args[17:]
    size = HeadSize.of(hidden, weight, backend, dtype, budget, lora_a, filter_eps)
    plan_size = (size.rows, size.vocab, dtype.itemsize)
    strategy = plan(*plan_size, smoothing, needs, budget, size.filtered)
    if strategy == "resident":
        chunk = resident_rows(*plan_size, needs[1], budget)
        logits = resident_size(chunk, size.vocab)
        return resident_workspace(size, chunk, logits, TILE_COLS, needs[:3])
    fold = fold_workspace(size, dtype, strategy == "frozen")
    if strategy == "frozen":
        return fold + size.rows * size.width * size.hidden_bytes
    if strategy == "recompute":
        return max(fold, recompute_workspace(size, needs[:3]))
    return fold


register_costs(linear_cross_entropy_fwd, flops=_flops, workspace=_workspace)


def linear_cross_entropy(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [M] int64
    bias: Tensor | None = None,  # [V]
    *,
    lora: LoraHead | None = None,
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
    filter_eps: float | None = None,
) -> LinearCrossEntropy:
    """Cross-entropy of a language-model head without the [M, V] logits.

    Equals, without the [M, V] tensor (`z` as in `linear_logprob`):

        loss = F.cross_entropy(z, targets, label_smoothing=label_smoothing, reduction="sum")
        loss = (loss + z_loss * z.logsumexp(-1)[targets != -100].square().sum()) / num_items

    Args:
        hidden, weight, targets, bias, lora, temperature, softcap, logit_scale, backend,
            compute_dtype: as in `linear_logprob`.
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
        filter_eps: as in `linear_logprob`, not with label smoothing.

    Returns:
        `LinearCrossEntropy`; `loss` is 0 and differentiable if no row is scored. Gradients are held
        from forward to backward: [M, H], [V, H], [V] and an adapter's where needed.

    Raises:
        ValueError, TypeError: as `linear_logprob`, and for arguments out of the ranges above.
    """
    check_tensors(hidden, weight, targets, bias, lora)
    check_outputs(outputs, OUTPUTS)
    check_filter(filter_eps, label_smoothing)
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
    lora_a, lora_b, lora_scale = (None, None, 1.0) if lora is None else lora
    parameters = (hidden, weight, bias, lora_a, lora_b)
    with_grad = torch.is_grad_enabled()
    found = linear_cross_entropy_fwd(
        hidden,
        weight,
        targets,
        bias,
        scale,
        lora_a,
        lora_b,
        float(lora_scale),
        float(label_smoothing),
        float(z_loss),
        *transform,
        ",".join(name for name in OUTPUTS if name in outputs),
        *(with_grad and x is not None and x.requires_grad for x in parameters),
        *settings,
        filter_eps,
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
