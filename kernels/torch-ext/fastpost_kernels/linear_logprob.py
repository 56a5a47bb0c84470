"""Log-probabilities of targets from hidden states and a language-model head, without [M, V] logits.

    y = h W^T + b,   z = softcap tanh(logit_scale y / softcap) / temperature
    logprob = z_t - lse(z),   entropy = lse(z) - sum_v p_v z_v,   p = softmax(z)
    d logprob / d h = sum_v ([v = t] - p_v) z'_v W_v
    with an adapter on the head: y += s (h A^T) B^T

Strategy. Logits exist as one reused tile: a GEMM fills it, one pass folds it into row statistics.
What needs gradients decides the rest; there is no switch.
  * nothing:      1 GEMM.
  * hidden only (frozen head: LoRA, QLoRA): the gradient above is attention with query h and
    key = value = W, so the forward runs it as such: tile of exponentials times W into an fp32
    accumulator. 2 GEMMs; the backward of any loss on logprob is one row scaling.
  * the head too: the loss's coefficients are unknown in the forward, so the backward recomputes
    each tile and writes d weight slice by slice. 4 GEMMs, no fp32 [V, H] buffer.
  * an adapter on the head widens the inner dimension of these GEMMs from H to H + r
    (`_lora_head.py`); W + s B A never exists. Frozen with the head it keeps the 2 GEMMs. Trained,
    it costs 3 instead of 4: d A and d B come from G B [M, r] and G^T u [V, r], G = d loss / d y.
    Keeping the frozen head's sums would give d hidden and d A without the third, but d B needs G,
    that is, the logits again: 3 as well, and [M, H] more memory.
  * rows with target -100 are dropped before any GEMM.
  * `filter_eps` drops the columns of a recomputed tile that hold no gradient worth adding
    (`_vocab_filter.py`).
Rejected: saving [M, V] logits in 16 bits (no recompute, 3 GEMMs): 2.4 GB at M 8192, V 151,936. When
the coefficients are known, `linear_cross_entropy` gets 3 GEMMs, and 2 with an adapter.

One head GEMM is 2 M H V FLOP; the adapter's thin ones are counted in `_vocab_flops.py`. Bytes
beyond results: see `workspace_bytes`; never O(M V).
Legend: M rows, H hidden, V vocabulary, r rank.
Sources: online softmax, Milakov and Gimelshein (arXiv:1805.02867); fused linear cross-entropy by
tiles, Wijmans et al., "Cut your losses" (arXiv:2411.09009); the frozen-head identity is
FlashAttention's forward (Dao et al., arXiv:2205.14135) with K = V = W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._cost import register_costs
from ._device import resolve_backend
from ._linear_arguments import (
    check_filter,
    check_outputs,
    check_tensors,
    make_lora,
    resolve_settings,
    resolve_transform,
)
from ._logprob_walks import forward, head_gradients, no_result
from ._lora_head import LoraHead
from ._namespace import add_op_namespace_prefix
from ._vocab_flops import gradient_flops, head_flops
from ._vocab_gradients import HeadGradients, fake_results
from ._vocab_passes import BLOCK_ELEMENTS, LogitTransform
from ._vocab_tiles import Head, statistics_dtype
from ._vocab_workspace import HeadSize, fold_workspace, recompute_workspace

__all__ = ["LinearLogprob", "LoraHead", "linear_logprob"]

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "logsumexp")


class LinearLogprob(NamedTuple):
    """Per-row results, [M] in float32 (float64 for float64 inputs); absent ones are None.

    `logprob`, `entropy` and `logsumexp` carry gradients. Rows with target -100 hold zeros.
    """

    logprob: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    logsumexp: Tensor | None = None


@torch.library.custom_op(add_op_namespace_prefix("linear_logprob_fwd"), mutates_args=())
def linear_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,  # comma-separated names
    with_jacobian: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
    filter_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, the OUTPUTS in order, stats, jacobian; those not asked for have no elements."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    backend = resolve_backend(backend, hidden.device, compute_dtype)
    lora = make_lora(lora_a, lora_b, lora_scale)
    head = Head(
        hidden, weight, bias, targets, transform, backend, compute_dtype, memory_budget, lora
    )
    names = tuple(name for name in outputs.split(",") if name)
    with torch.cuda.device_of(hidden):
        found = forward(head, names, with_jacobian)
    absent = {name: no_result(hidden, name, compute_dtype) for name in (*OUTPUTS, "jacobian")}
    found = absent | found
    entropy, squares, mean, top1, lse = (found[name] for name in OUTPUTS)
    return found["logprob"], entropy, squares, mean, top1, lse, found["stats"], found["jacobian"]


@linear_logprob_fwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,
    with_jacobian: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
    filter_eps: float | None,
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


@torch.library.custom_op(add_op_namespace_prefix("linear_logprob_bwd"), mutates_args=())
def linear_logprob_bwd(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    stats: Tensor,
    jacobian: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_lora_a: bool,
    need_lora_b: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
    filter_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d hidden, d weight, d bias, d lora_a, d lora_b; those not needed have no elements."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    backend = resolve_backend(backend, hidden.device, compute_dtype)
    lora = make_lora(lora_a, lora_b, lora_scale)
    settings = (backend, compute_dtype, memory_budget, lora, filter_eps)
    head = Head(hidden, weight, bias, targets, transform, *settings)
    with torch.cuda.device_of(hidden):
        found = head_gradients(
            head,
            stats,
            jacobian if jacobian.dim() == 2 else None,
            (grad_logprob, grad_entropy, grad_logsumexp),
            (need_hidden, need_weight, need_bias),
            (need_lora_a, need_lora_b),
        )
    return found.as_results(HeadGradients(hidden, weight, bias, lora_a, lora_b))


@linear_logprob_bwd.register_fake
def _(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    stats: Tensor,
    jacobian: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_lora_a: bool,
    need_lora_b: bool,
    backend: str,
    compute_dtype: torch.dtype,
    memory_budget: int,
    filter_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (need_hidden, need_weight, need_bias, need_lora_a, need_lora_b)
    return fake_results(HeadGradients(hidden, weight, bias, lora_a, lora_b), needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, lora_scale, logit_scale, softcap, temperature, outputs, _ = inputs[:12]
    ctx.save_for_backward(*tensors, *output[-2:])
    ctx.scalars, ctx.settings = (lora_scale, logit_scale, softcap, temperature), inputs[12:]
    ctx.outputs = outputs.split(",")
    # an output that no loss uses then arrives as None and costs nothing
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logprob = grads[0]
    # tracers hand a gradient to outputs without elements too
    grad_entropy = grads[1] if "entropy" in ctx.outputs else None
    grad_logsumexp = grads[5] if "logsumexp" in ctx.outputs else None
    unused = (None,) * 10
    if grad_logprob is None and grad_entropy is None and grad_logsumexp is None:
        return (None,) * 6 + unused
    *tensors, stats, jacobian = ctx.saved_tensors
    lora_scale, *transform = ctx.scalars
    of_targets = 2  # their place among the arguments: they have no gradient
    needs = list(ctx.needs_input_grad[:6])
    del needs[of_targets]
    found = linear_logprob_bwd(
        grad_logprob,
        grad_entropy,
        grad_logsumexp,
        *tensors,
        lora_scale,
        stats,
        jacobian,
        *transform,
        *needs,
        *ctx.settings,
    )
    gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
    gradients.insert(of_targets, None)
    return (*gradients, *unused)


linear_logprob_fwd.register_autograd(_backward, setup_context=_setup_context)


def _forward_flops(hidden: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    # args: targets, bias, lora_a, lora_b, 4 scalars, outputs, with_jacobian, ...
    return head_flops(hidden, weight, args[2]) * (1 + bool(args[9]))


def _backward_flops(*args: Any, **kwargs: Any) -> int:
    only_logprob = args[1] is None and args[2] is None
    hidden, weight, lora_a, jacobian = args[3], args[4], args[7], args[11]
    if len(jacobian) == 2 and only_logprob:
        return 0
    return head_flops(hidden, weight, lora_a) + gradient_flops(hidden, weight, lora_a, args[15:20])


def _forward_workspace(hidden: Tensor, weight: Tensor, *args: Any) -> int:
    with_jacobian, backend, dtype, budget = args[9:13]
    size = HeadSize.of(hidden, weight, backend, dtype, budget, args[2])
    return fold_workspace(size, dtype, with_jacobian)


def _backward_workspace(*args: Any) -> int:
    hidden, weight, lora_a, jacobian, needs = args[3], args[4], args[7], args[11], args[15:18]
    backend, dtype, budget, filter_eps = args[20:]
    size = HeadSize.of(hidden, weight, backend, dtype, budget, lora_a, filter_eps)
    if jacobian.dim() == 2 and args[1] is None and args[2] is None:
        return 2 * BLOCK_ELEMENTS * size.wide_bytes
    return recompute_workspace(size, needs)


register_costs(linear_logprob_fwd, flops=_forward_flops, workspace=_forward_workspace)
register_costs(linear_logprob_bwd, flops=_backward_flops, workspace=_backward_workspace)


def linear_logprob(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [M] int64
    bias: Tensor | None = None,  # [V]
    *,
    lora: LoraHead | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = (),
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    filter_eps: float | None = None,
) -> LinearLogprob:
    """log p(target) of every row, and other statistics of its distribution, without the logits.

    Equals, in float32 and without the [M, V] tensor:

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature
        logprob = z.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    Args:
        hidden: [M, H], float32, bfloat16 or float64.
        weight: [V, H], the head as `nn.Linear` stores it. Cast tile by tile to the compute dtype.
        targets: [M] int64; -100 marks rows that are not scored: they give 0, carry no gradient and
            are dropped before any multiplication. Their number is read back from the device, once
            per forward; the same read checks the range of all targets.
        bias: [V] or None.
        lora: an adapter on the head: a [r, H], b [V, r] of any of these dtypes, and its scale. Cast
            to the compute dtype; the target's logit holds it in the statistics' dtype.
        temperature, softcap, logit_scale: positive, see the equation; `softcap` None is no cap.
        outputs: names out of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1",
            "logsumexp". Each costs only when asked for.
        backend: "auto", "triton" (GPUs, or TRITON_INTERPRET=1), "cpp" (CPUs) or "torch".
        compute_dtype: what the GEMMs multiply; default autocast's, else that of `hidden`.
            Statistics and sums stay float32 (float64 for float64). On CPU, products of 16-bit
            operands are rounded to 16 bits once per tile before they are summed.
        memory_budget: bytes for the logits tile; default 128 MiB on CPU, 512 MiB on GPUs. Peak
            memory beyond the results is `workspace_bytes(op, *args)`: the budget plus terms in
            M H, n H (n <= 4096 tile columns) and V, never M V.
        filter_eps: leave tokens out of the GEMMs of a recomputing backward whose gradient is below
            this share of their row's own, in every row of a tile; 2**-12 is what 16-bit gradients
            resolve (arXiv:2411.09009). Gradients of hidden, weight and adapter become approximate:
            how much, and how many columns go, says `bench/ops/bench_gradient_filtering.py`. Their
            number is read back from the device once per tile. Without effect where nothing is
            recomputed (a frozen head).

    Returns:
        `LinearLogprob`. If of all tensors only `hidden` needs a gradient, [M, H] is kept for the
        backward, which is then a row scaling; otherwise the backward recomputes logit tiles. A NaN
        in a row of `hidden` makes that row's results NaN.

    Raises:
        ValueError: shapes or devices that do not fit, a target outside [0, V) that is not -100,
            non-positive factors, an unknown output, a backend that cannot run here.
        TypeError: dtypes other than those above.
    """
    check_tensors(hidden, weight, targets, bias, lora)
    check_outputs(outputs, OUTPUTS)
    check_filter(filter_eps)
    transform = resolve_transform(logit_scale, softcap, temperature)
    settings = resolve_settings(hidden, backend, compute_dtype, memory_budget)
    lora_a, lora_b, lora_scale = (None, None, 1.0) if lora is None else lora
    parameters = (weight, bias, lora_a, lora_b)
    head_is_frozen = not any(x is not None and x.requires_grad for x in parameters)
    with_jacobian = torch.is_grad_enabled() and hidden.requires_grad and head_is_frozen
    asked = ",".join(name for name in OUTPUTS if name in outputs)
    found = linear_logprob_fwd(
        hidden,
        weight,
        targets,
        bias,
        lora_a,
        lora_b,
        float(lora_scale),
        *transform,
        asked,
        with_jacobian,
        *settings,
        filter_eps,
    )
    logprob, entropy, squares, mean, top1, lse = found[:6]
    return LinearLogprob(
        logprob,
        entropy if "entropy" in outputs else None,
        squares.detach() if "log_sum_sq_probs" in outputs else None,
        mean.detach() if "mean_logits" in outputs else None,
        top1 if "is_top1" in outputs else None,
        lse if "logsumexp" in outputs else None,
    )
