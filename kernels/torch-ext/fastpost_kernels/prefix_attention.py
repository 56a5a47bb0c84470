"""Causal attention over packed tokens in which rows share their prefixes, exact and without a mask.

    out_t = Σ_{j ∈ path(t)} softmax_j(z_tj)·v_j,    z_tj = c·tanh(scale·q_t·k_j / c)   (c = softcap)

path(t) is the token itself, what comes before it in its segment, and every ancestor segment. With a
sink the softmax's denominator gains exp(sink_h); with a window only the last `window` tokens of the
path count.

Gradients, with p_tj = exp(z_tj − lse_t) and delta_t = dO_t·O_t:
    dV_j = Σ_t p_tj dO_t,  dz_tj = p_tj (dO_t·v_j − delta_t),  dQ = scale·dz K,  dK = scale·dzᵀ Q,
    dsink_h = −Σ_t exp(sink_h − lse_t)·delta_t

Strategy. Tokens lie in depth-first order, so the descendants of a segment are one contiguous range.
Attention is therefore a list of regions: each segment against itself, causal, and each segment's
descendants against the segment, unmasked. No key is copied, no mask exists. Each region is one call
of an ordinary attention kernel; rows with several regions merge by log-sum-exp. The backward runs
every region with the merged statistics, which makes each of its terms exact, and adds them in fp32.
Rejected: one call with a dense or block mask, which reads and multiplies the hidden rectangles too
(9 of 10 causal scores for 8 pairs of answers of 30 to 100 tokens to prompts of 90).

FLOPs: 2·Hq·(D + Dv) per visible pair forward, 2·Hq·(3D + 2Dv) backward: scores are computed again.
Memory: out, lse [Hq, N], and in the backward fp32 sums of dQ, dK, dV when prefixes are shared.

Legend: N unique tokens, S segments, Hq query heads, Hk key heads, D and Dv head sizes.
Sources: FlashAttention-2 (Dao, arXiv:2307.08691, algorithms 1 and 2); merging of partial softmaxes
(Milakov and Gimelshein, arXiv:1805.02867); sinks as in the GPT-OSS model card (arXiv:2508.10925).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _flash_varlen
from . import _prefix_costs as costs
from ._device import HAS_TRITON, triton_is_interpreted
from ._namespace import add_op_namespace_prefix
from ._prefix_costs import register_costs
from ._prefix_flash import backward_flash, forward_flash
from ._prefix_passes import backward, forward
from ._prefix_regions import Scoring, accumulate_dtype
from ._prefix_segments import schedule_of

__all__ = ["prefix_attention"]

_BACKENDS = ("auto", "cpu", "flash", "torch", "triton")
_MAX_TRITON_HEAD_SIZE = 256


@torch.library.custom_op(add_op_namespace_prefix("prefix_attention_fwd"), mutates_args=())
def _prefix_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    schedule = schedule_of(segments, query.shape[1])
    scoring = Scoring(scale, window, softcap)
    if backend == "triton":
        from ._prefix_triton import forward_triton  # optional package

        return forward_triton(query, key, value, sinks, schedule, scoring)
    if backend == "flash":
        return forward_flash(query, key, value, sinks, schedule, scoring)
    return forward(query, key, value, sinks, schedule, scoring, backend)


@torch.library.custom_op(add_op_namespace_prefix("prefix_attention_bwd"), mutates_args=())
def _prefix_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    schedule = schedule_of(segments, query.shape[1])
    scoring = Scoring(scale, window, softcap)
    if backend == "triton":
        from ._prefix_triton import backward_triton  # optional package

        return backward_triton(grad_out, query, key, value, out, lse, schedule, scoring)
    if backend == "flash":
        return backward_flash(grad_out, query, key, value, out, lse, schedule, scoring)
    return backward(grad_out, query, key, value, out, lse, schedule, scoring, backend)


def _new_tokens_outermost(x: Tensor, num_heads: int, head_size: int) -> Tensor:
    return x.new_empty(x.shape[1], num_heads, head_size).transpose(0, 1)


@_prefix_attention_fwd.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:2], dtype=accumulate_dtype(query.dtype))
    return _new_tokens_outermost(query, query.shape[0], value.shape[-1]), lse


@_prefix_attention_bwd.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [_new_tokens_outermost(x, x.shape[0], x.shape[2]) for x in (query, key, value)]
    return grads[0], grads[1], grads[2]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments, sinks, scale, window, softcap, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, segments, sinks, out, lse)
    ctx.scoring, ctx.backend = Scoring(scale, window, softcap), backend


def _autograd_backward(
    ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, segments, sinks, out, lse = ctx.saved_tensors
    grads: list[Tensor | None] = [None, None, None]
    if any(ctx.needs_input_grad[:3]):
        computed = _prefix_attention_bwd(
            grad_out, query, key, value, out, lse, segments, *ctx.scoring, ctx.backend
        )
        grads = [
            grad if is_needed else None
            for grad, is_needed in zip(computed, ctx.needs_input_grad[:3], strict=True)
        ]
    grad_sinks = None
    if sinks is not None and ctx.needs_input_grad[4]:
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        share = torch.exp(sinks.to(lse.dtype).unsqueeze(1) - lse)
        grad_sinks = -(share * delta).sum(1).to(sinks.dtype)
    return (*grads, None, grad_sinks, None, None, None, None)


_prefix_attention_fwd.register_autograd(_autograd_backward, setup_context=_setup_context)


register_costs(_prefix_attention_fwd, costs.forward_flops, costs.forward_workspace)
register_costs(_prefix_attention_bwd, costs.backward_flops, costs.backward_workspace)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over N packed tokens of rows that share prefixes. Differentiable once.

    Token t attends to itself and the earlier tokens of its own segment, and to all tokens of its
    segment's ancestors. Equal to, with `visible` [N, N] that pattern as a mask and G = Hq / Hk:

        scores = softcap * tanh(scale * query @ key.repeat_interleave(G, 0).mT / softcap)
        p = scores.masked_fill(~visible, -inf).softmax(-1)     # sinks: one more column, dropped
        out = p @ value.repeat_interleave(G, 0)

    Args:
        query: [Hq, N, D], floating point.
        key: [Hk, N, D], same dtype; Hq is a multiple of Hk.
        value: [Hk, N, Dv], same dtype.
        segments: [S, 3] int64 on the CPU: (start, end, subtree_end) in depth-first order. Tokens
            [start, end) are a segment, tokens [end, subtree_end) its descendants.
        scale: factor on q·k; 1/√D if None.
        window: a token attends to the last `window` tokens of its path, itself included.
        softcap: scores become softcap·tanh(score / softcap).
        sinks: [Hq] logits added to each row's softmax denominator.
        backend: "cpu" (PyTorch's blockwise kernel per region, or one C++ call where paths are
            short and shared), "triton", "flash" (flash-attn 2.8 on NVIDIA GPUs, 16 bits, heads of
            at most 256), "torch" (explicit scores in row chunks, any device and dtype), or "auto":
            "cpu" for CPU tensors, "triton" on GPUs for heads of at most 256, else "torch"; never
            "flash", which copies keys, and was not measured against "triton".

    Returns:
        [Hq, N, Dv] in the dtype of query, laid out with tokens outermost: `out.transpose(0, 1)` is
        contiguous. Sums are in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, segments, window, softcap or backend that do not fit.
        TypeError: dtypes that do not fit.
    """
    _check_tensors(query, key, value, segments, sinks)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the token itself), got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; pass None for no softcap")
    backend = _resolve_backend(backend, query, value)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    out, _ = _prefix_attention_fwd(
        query, key, value, segments, sinks, scale, window, softcap, backend
    )
    return out


def _resolve_backend(backend: str, query: Tensor, value: Tensor) -> str:
    """The backend that will run; one asked for by name that cannot raises instead."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}")
    on_cpu = query.device.type == "cpu"
    head_size = max(query.shape[2], value.shape[2])
    is_small = query.dtype.itemsize <= 4 and head_size <= _MAX_TRITON_HEAD_SIZE
    if backend == "auto":
        if on_cpu:
            return "cpu"
        return "triton" if HAS_TRITON and is_small else "torch"
    if backend == "flash":
        reason = _flash_varlen.unavailable_reason(query, head_size)
        if reason is not None:
            raise ValueError(f"backend 'flash' {reason}; use 'auto'")
    if backend == "cpu" and not on_cpu:
        raise ValueError(f"backend 'cpu' needs CPU tensors, got {query.device}; use 'auto'")
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError("backend 'triton' needs the package triton, which is not installed")
        if not is_small:
            raise ValueError(
                f"backend 'triton' takes at most 32-bit floats and {_MAX_TRITON_HEAD_SIZE} per "
                f"head, got {query.dtype} and {head_size}; use 'auto'"
            )
        if on_cpu and not triton_is_interpreted():
            raise ValueError("backend 'triton' on CPU tensors needs TRITON_INTERPRET=1; use 'auto'")
    return backend


def _check_tensors(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, sinks: Tensor | None
) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not (query.ndim == key.ndim == value.ndim == 3):
        raise ValueError(
            f"expected query [Hq, N, D], key [Hk, N, D] and value [Hk, N, Dv], got {shapes}; "
            "drop the batch dimension: packed tokens have none"
        )
    if key.shape[:2] != value.shape[:2] or key.shape[1:] != query.shape[1:]:
        raise ValueError(f"query, key and value disagree in tokens, heads or head size: {shapes}")
    if query.shape[0] % key.shape[0]:
        raise ValueError(f"query heads must be a multiple of key heads, got {shapes}")
    if not (query.dtype == key.dtype == value.dtype) or not query.is_floating_point():
        raise TypeError(
            "query, key and value must share one floating dtype, got "
            f"{query.dtype}, {key.dtype}, {value.dtype}"
        )
    if segments.ndim != 2 or segments.shape[1] != 3:
        raise ValueError(
            f"segments must be [S, 3] of (start, end, subtree_end), got {list(segments.shape)}"
        )
    if segments.dtype != torch.int64 or segments.device.type != "cpu":
        raise TypeError(
            f"segments must be int64 on the CPU, got {segments.dtype} on {segments.device}: "
            "the host plans from them and must not wait for a device"
        )
    if sinks is not None and sinks.shape != query.shape[:1]:
        raise ValueError(f"sinks must be [Hq] = [{query.shape[0]}], got {list(sinks.shape)}")
