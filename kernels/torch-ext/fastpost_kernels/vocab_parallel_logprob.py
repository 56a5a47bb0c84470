"""linear_logprob where each process of a group holds a part of the head's vocabulary.

The tensor-parallel layout of Megatron: rank r holds rows [start, end) of the head [V, H], all ranks
hold the same hidden rows, and results and gradients equal those of one process.

    lse = log sum_r exp(lse_r),   logprob = z_t - lse
    d logprob / d h = sum_r sum_{v of r} ([v = t] - p_v) z'_v W_v

Strategy. Each rank folds its tiles as `linear_logprob` does, from the same first reference: the
target's logit, which one rank computes and all receive. Then maxima and sums are reduced, and with
them every rank finishes the same statistics. Gradients follow the same two cases:
  * frozen head: each rank's accumulator of exponentials times W, scaled by the common normaliser,
    is already its part of d logprob / d h. It is summed over ranks in the forward, and the backward
    of any loss is one row scaling without communication.
  * trained head: the backward recomputes this rank's tiles; d weight and d bias stay local, d
    hidden is summed once.
Rejected: gathering the logits (2 V bytes a row, against 16 to 40 and d hidden) or the head.

Each rank multiplies 2 M H Vr FLOP per head GEMM. Communicated, with w = 4 bytes (8 in float64) and
m <= 4096 scored rows in a chunk (fewer under a small budget), as payload of each collective:

    once a call   all-gather of 18 int64: 144 bytes a rank (do all agree, and are the targets valid)
    every chunk   sum of 2 w m (target), max of w m (4 w m with is_top1),
                  sum of w m (4 w m with entropy, log_sum_sq_probs or mean_logits)
    frozen head   sum of w m H in the forward
    trained head  sum of w M H in the backward

A ring moves 2 (N - 1) / N times a sum's payload through each of N ranks. Sums of gradients run in
the statistics' dtype and are rounded once, as in one process.
Legend: M rows, m a chunk of scored rows, H hidden, V vocabulary, Vr the part of rank r, N ranks.
Sources: vocabulary-parallel cross-entropy, Shoeybi et al., "Megatron-LM" (arXiv:1909.08053, section
3); the walks are those of `linear_logprob.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._cost import register_costs
from ._device import resolve_backend
from ._linear_arguments import (
    COMPUTE_DTYPES,
    check_outputs,
    check_tensors,
    resolve_settings,
    resolve_transform,
)
from ._logprob_walks import no_result
from ._namespace import add_op_namespace_prefix
from ._vocab_agreement import Group, Terms, agree, refuse
from ._vocab_parallel_walks import Part, backward, forward
from ._vocab_passes import BLOCK_ELEMENTS, LogitTransform
from ._vocab_tiles import Head, statistics_dtype
from ._vocab_workspace import HeadSize, fold_workspace, recompute_workspace

if TYPE_CHECKING:  # some builds of torch come without it
    from torch.distributed import ProcessGroup

__all__ = ["VocabParallelLogprob", "vocab_parallel_logprob"]

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "logsumexp")


class VocabParallelLogprob(NamedTuple):
    """As `LinearLogprob`: [M] each, equal on all ranks; absent ones are None."""

    logprob: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    logsumexp: Tensor | None = None


@torch.library.custom_op(add_op_namespace_prefix("vocab_parallel_logprob_fwd"), mutates_args=())
def vocab_parallel_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    vocab_start: int,
    vocab_size: int,
    group_name: str,
    group_size: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,  # comma-separated names
    need_hidden: bool,
    with_jacobian: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, the OUTPUTS in order, stats, jacobian; those not asked for have no elements."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    group = Group(group_name, group_size)
    try:
        backend = resolve_backend(backend, hidden.device, compute_dtype)
    except ValueError:
        refuse(group, hidden.device)
        raise
    names = tuple(name for name in outputs.split(",") if name)
    options = (
        memory_budget,
        COMPUTE_DTYPES.index(compute_dtype),
        sum(1 << OUTPUTS.index(name) for name in names),
        2 * need_hidden + with_jacobian,
        bias is not None,
        logit_scale,
        0.0 if softcap is None else softcap,
        temperature,
    )
    head = Head(hidden, weight, bias, targets, transform, backend, compute_dtype, memory_budget)
    with torch.cuda.device_of(hidden):
        agree(group, Terms(hidden, weight, targets, vocab_start, vocab_size, options))
        found = forward(head, Part(vocab_start, vocab_size, group), names, with_jacobian)
    absent = {name: no_result(hidden, name, compute_dtype) for name in (*OUTPUTS, "jacobian")}
    found = absent | found
    entropy, squares, mean, top1, lse = (found[name] for name in OUTPUTS)
    return found["logprob"], entropy, squares, mean, top1, lse, found["stats"], found["jacobian"]


@vocab_parallel_logprob_fwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    vocab_start: int,
    vocab_size: int,
    group_name: str,
    group_size: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,
    need_hidden: bool,
    with_jacobian: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> tuple[Tensor, ...]:
    rows, width = hidden.shape
    wide = statistics_dtype(compute_dtype)
    names = outputs.split(",")
    optional = [
        hidden.new_empty(rows, dtype=torch.bool if name == "is_top1" else wide)
        if name in names
        else no_result(hidden, name, compute_dtype)
        for name in OUTPUTS
    ]
    jacobian = hidden.new_empty((rows, width) if with_jacobian else (0,))
    stats = hidden.new_empty(4, rows, dtype=wide)
    return (hidden.new_empty(rows, dtype=wide), *optional, stats, jacobian)


@torch.library.custom_op(add_op_namespace_prefix("vocab_parallel_logprob_bwd"), mutates_args=())
def vocab_parallel_logprob_bwd(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    jacobian: Tensor,
    vocab_start: int,
    vocab_size: int,
    group_name: str,
    group_size: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """d hidden, and this rank's d weight and d bias; those not needed have no elements."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    backend = resolve_backend(backend, hidden.device, compute_dtype)
    head = Head(hidden, weight, bias, targets, transform, backend, compute_dtype, memory_budget)
    with torch.cuda.device_of(hidden):
        found = backward(
            head,
            Part(vocab_start, vocab_size, Group(group_name, group_size)),
            stats,
            jacobian if jacobian.dim() == 2 else None,
            (grad_logprob, grad_entropy, grad_logsumexp),
            (need_hidden, need_weight, need_bias),
        )
    d_hidden, d_weight, d_bias = found
    return (
        hidden.new_empty(0) if d_hidden is None else d_hidden,
        weight.new_empty(0) if d_weight is None else d_weight,
        (weight if bias is None else bias).new_empty(0) if d_bias is None else d_bias,
    )


@vocab_parallel_logprob_bwd.register_fake
def _(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    jacobian: Tensor,
    vocab_start: int,
    vocab_size: int,
    group_name: str,
    group_size: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_like = weight if bias is None else bias
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        bias_like.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *place = inputs[:8]
    *_, stats, jacobian = output
    ctx.save_for_backward(hidden, weight, targets, bias, stats, jacobian)
    ctx.place, ctx.transform, ctx.settings = place, inputs[8:11], inputs[14:]
    ctx.outputs = inputs[11].split(",")
    # an output that no loss uses then arrives as None and costs nothing
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logprob = grads[0]
    # tracers hand a gradient to outputs without elements too
    grad_entropy = grads[1] if "entropy" in ctx.outputs else None
    grad_logsumexp = grads[5] if "logsumexp" in ctx.outputs else None
    unused = (None,) * 13
    if grad_logprob is None and grad_entropy is None and grad_logsumexp is None:
        return (None, None, None, None, *unused)
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    d_hidden, d_weight, d_bias = vocab_parallel_logprob_bwd(
        grad_logprob,
        grad_entropy,
        grad_logsumexp,
        *ctx.saved_tensors,
        *ctx.place,
        *ctx.transform,
        need_hidden,
        need_weight,
        need_bias,
        *ctx.settings,
    )
    return (
        d_hidden if need_hidden else None,
        d_weight if need_weight else None,
        None,
        d_bias if need_bias else None,
        *unused,
    )


vocab_parallel_logprob_fwd.register_autograd(_backward, setup_context=_setup_context)


def _forward_flops(hidden: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    # args: targets, bias, vocab_start, ..., outputs, need_hidden, with_jacobian, ...
    return 2 * hidden[0] * weight[0] * weight[1] * (1 + bool(args[11]))


def _backward_flops(*args: Any, **kwargs: Any) -> int:
    only_logprob = args[1] is None and args[2] is None
    (rows, width), held, jacobian = args[3], args[4][0], args[8]
    if len(jacobian) == 2 and only_logprob:
        return 0
    return 2 * rows * width * held * (1 + args[16] + args[17])


def _forward_workspace(hidden: Tensor, weight: Tensor, *args: Any) -> int:
    with_jacobian, backend, dtype, budget = args[11:]
    # tiles are planned for the whole vocabulary
    size = HeadSize.of(hidden, weight, backend, dtype, budget)
    # its walk takes the default tile on every rank
    size = size._replace(vocab=args[3], device=None)
    return fold_workspace(size, dtype, with_jacobian)


def _backward_workspace(*args: Any) -> int:
    hidden, weight, jacobian, needs, settings = args[3], args[4], args[8], args[16:19], args[19:]
    size = HeadSize.of(hidden, weight, *settings)
    if jacobian.dim() == 2 and args[1] is None and args[2] is None:
        return 2 * BLOCK_ELEMENTS * size.wide_bytes
    return recompute_workspace(size._replace(vocab=max(1, size.vocab)), needs)


register_costs(vocab_parallel_logprob_fwd, flops=_forward_flops, workspace=_forward_workspace)
register_costs(vocab_parallel_logprob_bwd, flops=_backward_flops, workspace=_backward_workspace)


def _check_place(weight: Tensor, vocab_start: int, vocab_size: int) -> None:
    end = vocab_start + weight.shape[0]
    if not (vocab_size > 0 and 0 <= vocab_start <= end <= vocab_size):
        raise ValueError(
            f"weight_shard holds rows [{vocab_start}, {end}) of a head of vocab_size {vocab_size}: "
            "expected a part of [0, vocab_size); cut padded rows off, weight_shard[:vocab_size - "
            "vocab_start]"
        )


def _at_least_one_row(shard: Tensor) -> Tensor:
    """For checks that a rank without rows of the head must pass as well."""
    return shard if shard.shape[0] else shard.new_empty(1, *shard.shape[1:])


def vocab_parallel_logprob(
    hidden: Tensor,  # [M, H]
    weight_shard: Tensor,  # [Vr, H]
    targets: Tensor,  # [M] int64
    group: ProcessGroup,
    *,
    vocab_start: int,
    vocab_size: int,
    bias_shard: Tensor | None = None,  # [Vr]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = (),
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> VocabParallelLogprob:
    """`linear_logprob` of a head whose vocabulary is spread over the processes of a group.

    Equals, on every rank, and without the whole head or any logits in one place:

        weight = torch.cat(weight_shards)  # in the order of vocab_start
        linear_logprob(hidden, weight, targets, bias, ...)

    Every rank of `group` calls it with the same arguments, its own shard apart.

    Args:
        hidden: [M, H], the same rows on every rank. Its gradient comes back summed over ranks: do
            not reduce it again.
        weight_shard: [Vr, H], rows [vocab_start, vocab_start + Vr) of the head. Ranks may hold
            different numbers of rows, or none; rows that only pad the vocabulary must be cut off.
        targets: [M] int64 in the whole vocabulary, the same on every rank; -100 is not scored.
        group: the tensor-parallel process group.
        vocab_start, vocab_size: this rank's first row, and the rows of all ranks together.
        bias_shard: [Vr] or None, on every rank alike.
        temperature, softcap, logit_scale, outputs, backend, compute_dtype, memory_budget: as in
            `linear_logprob`; the budget must be the same on every rank.

    Returns:
        `VocabParallelLogprob`, equal on all ranks; `logprob`, `entropy` and `logsumexp` carry
        gradients. d weight and d bias are those of this rank's rows.

    Raises:
        ValueError, TypeError: as `linear_logprob`, and where shards do not tile the vocabulary or
            ranks differ in what must be equal. If one rank raises so, all do: the others get a
            ValueError that names it.
    """
    where = Group(group.group_name, group.size())
    try:
        bias = None if bias_shard is None else _at_least_one_row(bias_shard)
        check_tensors(hidden, _at_least_one_row(weight_shard), targets, bias)
        if bias_shard is not None and len(bias_shard) != len(weight_shard):
            raise ValueError(
                f"bias_shard must be [Vr] = [{len(weight_shard)}] like weight_shard, got "
                f"{tuple(bias_shard.shape)}"
            )
        _check_place(weight_shard, vocab_start, vocab_size)
        check_outputs(outputs, OUTPUTS)
        transform = resolve_transform(logit_scale, softcap, temperature)
        settings = resolve_settings(hidden, backend, compute_dtype, memory_budget)
    except (TypeError, ValueError):
        refuse(where, hidden.device)
        raise
    head_is_frozen = not (
        weight_shard.requires_grad or (bias_shard is not None and bias_shard.requires_grad)
    )
    need_hidden = torch.is_grad_enabled() and hidden.requires_grad
    with_jacobian = need_hidden and head_is_frozen
    asked = ",".join(name for name in OUTPUTS if name in outputs)
    found = vocab_parallel_logprob_fwd(
        hidden,
        weight_shard,
        targets,
        bias_shard,
        vocab_start,
        vocab_size,
        *where,
        *transform,
        asked,
        need_hidden,
        with_jacobian,
        *settings,
    )
    logprob, entropy, squares, mean, top1, lse = found[:6]
    return VocabParallelLogprob(
        logprob,
        entropy if "entropy" in outputs else None,
        squares.detach() if "log_sum_sq_probs" in outputs else None,
        mean.detach() if "mean_logits" in outputs else None,
        top1 if "is_top1" in outputs else None,
        lse if "logsumexp" in outputs else None,
    )
