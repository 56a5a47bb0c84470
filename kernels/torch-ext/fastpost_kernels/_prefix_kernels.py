"""Kernels of prefix_attention in Triton; `_prefix_triton.py` plans and launches them.

A query block lies inside one segment and walks a short list of key ranges. A key block lies inside
one segment too, and the rows that see it are one contiguous range. In depth-first order no token
sees a later one, so causality is one comparison of token indices, also across segments.

Scores are kept in units of log 2, as the hardware's exponential wants them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

__all__: list[str] = []

_LOG2E = tl.constexpr(1.4426950408889634)
_AFTER_ALL = tl.constexpr(0x7FFFFFFF)  # index of a key that no row may see


@triton.jit
def _load_rows(
    ptr, stride, offs, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """Rows `offs` of a [N, SIZE] view as [len(offs), BLOCK], zero outside."""
    cols = tl.arange(0, BLOCK)
    ptrs = ptr + offs.to(tl.int64)[:, None] * stride + cols[None, :]
    if SIZE < BLOCK:
        inside = (cols < SIZE)[None, :]
        if MASKED:
            inside = inside & mask[:, None]
        return tl.load(ptrs, mask=inside, other=0.0)
    if MASKED:
        return tl.load(ptrs, mask=mask[:, None], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _store_rows(ptr, stride, offs, mask, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    ptrs = ptr + offs.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask[:, None] & (cols < SIZE)[None, :])


@triton.jit
def _log2_scores(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of log 2, and tanh(score / softcap), from which the slope follows."""
    capped = products
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), both ends exact
        capped = 1.0 - 2.0 / (tl.exp2(products * (2.0 * scale / softcap * _LOG2E)) + 1.0)
        scores = capped * (softcap * _LOG2E)
    else:
        scores = products * (scale * _LOG2E)
    return scores, capped


@triton.jit
def _hide(
    scores, index_q, index_k, pos_q, pos_k, window, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr
):
    """−inf where the key is after the query or out of its window; indices as they broadcast."""
    if MASKED:
        scores = tl.where(index_k <= index_q, scores, -float("inf"))
    if HAS_WINDOW:
        scores = tl.where(pos_q - pos_k < window, scores, -float("inf"))
    return scores


@triton.jit
def _fold_keys(
    acc,  # [BLOCK_M, BLOCK_DV]
    row_max,  # [BLOCK_M], log 2
    row_sum,  # [BLOCK_M]
    q,
    offs_m,
    pos_m,
    key_ptr,
    value_ptr,
    positions_ptr,
    stride_kn,
    stride_vn,
    start,
    end,
    scale,
    softcap,
    window,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Online softmax over keys [start, end); unless MASKED all rows see all of them."""
    for first in tl.range(start, end, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        pos_n = offs_n
        if HAS_WINDOW:
            pos_n = tl.load(positions_ptr + offs_n, mask=mask_n, other=0)
        k = _load_rows(key_ptr, stride_kn, offs_n, mask_n, HEAD_SIZE, BLOCK_D, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores, _ = _log2_scores(products, scale, softcap, HAS_SOFTCAP)
        index_n = tl.where(mask_n, offs_n, _AFTER_ALL)
        scores = _hide(
            scores, offs_m[:, None], index_n[None, :], pos_m[:, None], pos_n[None, :], window,
            HAS_WINDOW, MASKED,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing yet stays at zero instead of exp2(−inf + inf).
        reference = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(row_max - reference)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v = _load_rows(value_ptr, stride_vn, offs_n, mask_n, VALUE_SIZE, BLOCK_DV, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["stride_lh"])  # the number of tokens
def prefix_attention_fwd_kernel(
    # pointers
    query_ptr,  # [Hq, N, D]
    key_ptr,  # [Hk, N, D]
    value_ptr,  # [Hk, N, Dv]
    sinks_ptr,  # [Hq]
    out_ptr,  # [Hq, N, Dv]
    lse_ptr,  # [Hq, N] fp32
    blocks_ptr,  # [blocks, 4] int32: first row, end of rows, first range, end of ranges
    ranges_ptr,  # [ranges, 2] int32: first key, end of keys
    positions_ptr,  # [N] int32
    # strides; the last dimension is contiguous
    stride_qh,
    stride_qn,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    stride_oh,
    stride_on,
    stride_lh,
    # scalars
    scale,
    softcap,
    window,
    # flags and sizes
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (query blocks, Hq): writes `out` and `lse` of one block's rows."""
    head = tl.program_id(1).to(tl.int64)
    table = blocks_ptr + tl.program_id(0) * 4
    first_row = tl.load(table)
    end_row = tl.load(table + 1)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    offs_m = first_row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end_row
    pos_m = offs_m
    if HAS_WINDOW:
        pos_m = tl.load(positions_ptr + offs_m, mask=mask_m, other=0)
    key_ptr += head // GROUPS * stride_kh
    value_ptr += head // GROUPS * stride_vh
    q = _load_rows(
        query_ptr + head * stride_qh, stride_qn, offs_m, mask_m, HEAD_SIZE, BLOCK_D, True
    )
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:  # one more key, with value zero
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        row_max = tl.zeros([BLOCK_M], tl.float32) + sink
        row_sum += 1.0
    for index in range(tl.load(table + 2), tl.load(table + 3)):
        start = tl.load(ranges_ptr + index * 2)
        end = tl.minimum(tl.load(ranges_ptr + index * 2 + 1), end_row)
        whole = start + (tl.minimum(end, first_row + 1) - start) // BLOCK_N * BLOCK_N
        acc, row_max, row_sum = _fold_keys(
            acc, row_max, row_sum, q, offs_m, pos_m, key_ptr, value_ptr, positions_ptr,
            stride_kn, stride_vn, start, whole, scale, softcap, window, HEAD_SIZE, VALUE_SIZE,
            HAS_SOFTCAP, HAS_WINDOW, False, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        acc, row_max, row_sum = _fold_keys(
            acc, row_max, row_sum, q, offs_m, pos_m, key_ptr, value_ptr, positions_ptr,
            stride_kn, stride_vn, whole, end, scale, softcap, window, HEAD_SIZE, VALUE_SIZE,
            HAS_SOFTCAP, HAS_WINDOW, True, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    row_sum = tl.where(mask_m, row_sum, 1.0)
    out_ptr += head * stride_oh
    _store_rows(out_ptr, stride_on, offs_m, mask_m, acc / row_sum[:, None], VALUE_SIZE, BLOCK_DV)
    lse = (row_max + tl.log2(row_sum)) / _LOG2E
    tl.store(lse_ptr + head * stride_lh + offs_m, lse, mask=mask_m)


@triton.jit
def _grad_scores(
    left, right, grad_left, grad_right, lse, delta, index_q, index_k, pos_q, pos_k, scale, softcap,
    window, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """p and the gradient of scale·q·k, queries down and keys across, or the other way round.

    left is q and grad_left dO, right is k and grad_right v, or swapped; the rest broadcasts.
    """
    products = tl.dot(left, tl.trans(right), input_precision="ieee")
    scores, capped = _log2_scores(products, scale, softcap, HAS_SOFTCAP)
    scores = _hide(scores, index_q, index_k, pos_q, pos_k, window, HAS_WINDOW, True)
    p = tl.exp2(scores - lse * _LOG2E)
    d_p = tl.dot(grad_left, tl.trans(grad_right), input_precision="ieee")
    d_scores = p * (d_p - delta)
    if HAS_SOFTCAP:
        d_scores *= 1.0 - capped * capped
    return p, d_scores


@triton.jit(do_not_specialize=["stride_lh"])  # the number of tokens
def prefix_attention_bwd_query_kernel(
    # pointers
    query_ptr,  # [Hq, N, D]
    key_ptr,  # [Hk, N, D]
    value_ptr,  # [Hk, N, Dv]
    grad_out_ptr,  # [Hq, N, Dv]
    lse_ptr,  # [Hq, N] fp32
    delta_ptr,  # [Hq, N] fp32
    grad_query_ptr,  # [Hq, N, D]
    blocks_ptr,  # as in the forward
    ranges_ptr,
    positions_ptr,
    # strides
    stride_qh,
    stride_qn,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    stride_oh,
    stride_on,
    stride_gh,
    stride_gn,
    stride_lh,
    # scalars
    scale,
    softcap,
    window,
    # flags and sizes
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (query blocks, Hq): writes dQ of one block's rows."""
    head = tl.program_id(1).to(tl.int64)
    table = blocks_ptr + tl.program_id(0) * 4
    first_row = tl.load(table)
    end_row = tl.load(table + 1)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    offs_m = first_row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end_row
    key_ptr += head // GROUPS * stride_kh
    value_ptr += head // GROUPS * stride_vh
    query_ptr += head * stride_qh
    grad_out_ptr += head * stride_oh
    q = _load_rows(query_ptr, stride_qn, offs_m, mask_m, HEAD_SIZE, BLOCK_D, True)
    d_out = _load_rows(grad_out_ptr, stride_on, offs_m, mask_m, VALUE_SIZE, BLOCK_DV, True)
    lse = tl.load(lse_ptr + head * stride_lh + offs_m, mask=mask_m, other=float("inf"))
    delta = tl.load(delta_ptr + head * stride_lh + offs_m, mask=mask_m, other=0.0)
    pos_m = offs_m
    if HAS_WINDOW:
        pos_m = tl.load(positions_ptr + offs_m, mask=mask_m, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for index in range(tl.load(table + 2), tl.load(table + 3)):
        start = tl.load(ranges_ptr + index * 2)
        end = tl.minimum(tl.load(ranges_ptr + index * 2 + 1), end_row)
        for first in tl.range(start, end, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            mask_n = offs_n < end
            pos_n = offs_n
            if HAS_WINDOW:
                pos_n = tl.load(positions_ptr + offs_n, mask=mask_n, other=0)
            k = _load_rows(key_ptr, stride_kn, offs_n, mask_n, HEAD_SIZE, BLOCK_D, True)
            v = _load_rows(value_ptr, stride_vn, offs_n, mask_n, VALUE_SIZE, BLOCK_DV, True)
            index_n = tl.where(mask_n, offs_n, _AFTER_ALL)
            _, d_scores = _grad_scores(
                q, k, d_out, v, lse[:, None], delta[:, None], offs_m[:, None], index_n[None, :],
                pos_m[:, None], pos_n[None, :], scale, softcap, window, HAS_SOFTCAP, HAS_WINDOW,
            )  # fmt: skip
            acc = tl.dot(d_scores.to(k.dtype), k, acc, input_precision="ieee")
    grad_query_ptr += head * stride_gh
    _store_rows(grad_query_ptr, stride_gn, offs_m, mask_m, acc * scale, HEAD_SIZE, BLOCK_D)


@triton.jit(do_not_specialize=["stride_lh"])  # the number of tokens
def prefix_attention_bwd_key_kernel(
    # pointers
    query_ptr,  # [Hq, N, D]
    key_ptr,  # [Hk, N, D]
    value_ptr,  # [Hk, N, Dv]
    grad_out_ptr,  # [Hq, N, Dv]
    lse_ptr,  # [Hq, N] fp32
    delta_ptr,  # [Hq, N] fp32
    grad_key_ptr,  # [Hk, N, D]
    grad_value_ptr,  # [Hk, N, Dv]
    blocks_ptr,  # [blocks, 3] int32: first key, end of keys, end of the rows that see them
    positions_ptr,
    # strides
    stride_qh,
    stride_qn,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    stride_oh,
    stride_on,
    stride_gkh,
    stride_gkn,
    stride_gvh,
    stride_gvn,
    stride_lh,
    # scalars
    scale,
    softcap,
    window,
    # flags and sizes
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (key blocks, Hk): writes dK and dV of one block's keys, over all heads of the group."""
    key_head = tl.program_id(1).to(tl.int64)
    table = blocks_ptr + tl.program_id(0) * 3
    first_key = tl.load(table)
    end_key = tl.load(table + 1)
    end_row = tl.load(table + 2)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    offs_n = first_key + tl.arange(0, BLOCK_N)
    mask_n = offs_n < end_key
    pos_n = offs_n
    if HAS_WINDOW:
        pos_n = tl.load(positions_ptr + offs_n, mask=mask_n, other=0)
    key_ptr += key_head * stride_kh
    value_ptr += key_head * stride_vh
    k = _load_rows(key_ptr, stride_kn, offs_n, mask_n, HEAD_SIZE, BLOCK_D, True)
    v = _load_rows(value_ptr, stride_vn, offs_n, mask_n, VALUE_SIZE, BLOCK_DV, True)
    index_n = tl.where(mask_n, offs_n, _AFTER_ALL)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    num_blocks = (end_row - first_key + BLOCK_M - 1) // BLOCK_M
    for step in tl.range(0, num_blocks * GROUPS):  # one loop over heads and rows: sums stay put
        head = key_head * GROUPS + step // num_blocks
        offs_m = first_key + step % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end_row
        pos_m = offs_m
        if HAS_WINDOW:
            pos_m = tl.load(positions_ptr + offs_m, mask=mask_m, other=0)
        q_ptr = query_ptr + head * stride_qh
        d_out_ptr = grad_out_ptr + head * stride_oh
        q = _load_rows(q_ptr, stride_qn, offs_m, mask_m, HEAD_SIZE, BLOCK_D, True)
        d_out = _load_rows(d_out_ptr, stride_on, offs_m, mask_m, VALUE_SIZE, BLOCK_DV, True)
        lse_offs = head * stride_lh + offs_m  # rows past the end: p = exp(−inf) = 0
        lse = tl.load(lse_ptr + lse_offs, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + lse_offs, mask=mask_m, other=0.0)
        # Keys down, queries across: p and dz are then left operands, straight from registers.
        p, d_scores = _grad_scores(
            k, q, v, d_out, lse[None, :], delta[None, :], offs_m[None, :], index_n[:, None],
            pos_m[None, :], pos_n[:, None], scale, softcap, window, HAS_SOFTCAP, HAS_WINDOW,
        )  # fmt: skip
        if NEEDS_VALUE:
            grad_v = tl.dot(p.to(d_out.dtype), d_out, grad_v, input_precision="ieee")
        if NEEDS_KEY:
            grad_k = tl.dot(d_scores.to(q.dtype), q, grad_k, input_precision="ieee")
    if NEEDS_KEY:
        grad_key_ptr += key_head * stride_gkh
        _store_rows(grad_key_ptr, stride_gkn, offs_n, mask_n, grad_k * scale, HEAD_SIZE, BLOCK_D)
    if NEEDS_VALUE:
        grad_value_ptr += key_head * stride_gvh
        _store_rows(grad_value_ptr, stride_gvn, offs_n, mask_n, grad_v, VALUE_SIZE, BLOCK_DV)
