# mypy: disable-error-code="no-untyped-def"
# (arguments of jit functions are pointers and constexprs, which have no Python types)
"""The tile passes of `_vocab_passes.py` as Triton kernels.

One program folds one row of one tile, held in registers as a whole: logits are read once. All
kernels are bound by memory bandwidth, so what counts is 128-bit loads and no spills, which a test
asserts on the compiled code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._vocab_passes import LogitTransform

__all__: list[str] = []

# Widest tile a fold can hold in registers: 16 fp32 values per thread at 8 warps.
MAX_FOLD_COLS = 4096
GRADIENT_BLOCK = 2048
RESCALE_BLOCK = 1024


@triton.jit
def _transform(y, logit_scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """z and the part of dz/dy that is not constant."""
    if HAS_SOFTCAP:
        x = y * (logit_scale / softcap)
        u = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - u) / (1.0 + u)
        # 1 - u cancels near zero: Taylor series of tanh to x^11 below 0.3
        s = x * x
        series = -8.863235530e-3 * s + 2.186948854e-2
        series = series * s - 5.396825397e-2
        series = series * s + 1.333333333e-1
        series = series * s - 3.333333333e-1
        tanh = tl.where(tl.abs(x) < 0.3, x + x * s * series, tl.where(x < 0, -far, far))
        z = tanh * (softcap * inv_temperature)
        slope = 4.0 * u / ((1.0 + u) * (1.0 + u))
    else:
        z = y * (logit_scale * inv_temperature)
        slope = tl.full(y.shape, 1.0, tl.float32)
    return z, slope


@triton.jit(do_not_specialize=["first_col"])
def _linear_logprob_fold_kernel(
    # pointers
    tile_ptr,  # [m, n]
    bias_ptr,  # [n] fp32
    targets_ptr,  # [m] int64
    state_ptr,  # [9, m] fp32
    # strides and sizes
    stride_tile,
    stride_state,
    first_col,
    n_cols,
    # scalars
    logit_scale,
    softcap,
    inv_temperature,
    # flags
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    STORE_EXP: tl.constexpr,
    MAX_LAG: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (m,): program r merges row r into column r of `state` and may overwrite the row."""
    row = tl.program_id(0).to(tl.int64)
    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    row_ptr = tile_ptr + row * stride_tile
    st_ptr = state_ptr + row
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < n_cols
    local = (tl.load(targets_ptr + row) - first_col).to(tl.int64)
    others = mask_v & (offs_v != local)

    y = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)
    if HAS_TOP1:
        before = tl.max(tl.where(others & (offs_v < local), y, -float("inf")), axis=0)
        after = tl.max(tl.where(others & (offs_v > local), y, -float("inf")), axis=0)
        tl.store(st_ptr + 6 * stride_state, tl.maximum(tl.load(st_ptr + 6 * stride_state), before))
        tl.store(st_ptr + 7 * stride_state, tl.maximum(tl.load(st_ptr + 7 * stride_state), after))
        self_logit = tl.sum(tl.where(mask_v & (offs_v == local), y, 0.0), axis=0)
        if (local >= 0) & (local < n_cols):
            tl.store(st_ptr + 5 * stride_state, self_logit)

    z, slope = _transform(y, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
    zmax = tl.max(tl.where(others, z, -float("inf")), axis=0)
    old_ref = tl.load(st_ptr)
    old_sum = tl.load(st_ptr + stride_state)
    ref = tl.where(zmax - old_ref > MAX_LAG, zmax, old_ref)
    moved = tl.where(ref == old_ref, 0.0, old_ref - ref)
    rescale = tl.exp(moved)
    d = z - ref
    e = tl.where(others, tl.exp(d), 0.0)
    if HAS_MOMENTS:
        xsum = (tl.load(st_ptr + 2 * stride_state) + moved * old_sum) * rescale
        xsum += tl.sum(e * tl.where(e == 0.0, 0.0, d), axis=0)
        squares = tl.load(st_ptr + 3 * stride_state) * rescale * rescale + tl.sum(e * e, axis=0)
        zsum = tl.load(st_ptr + 4 * stride_state) + tl.sum(tl.where(others, z, 0.0), axis=0)
        tl.store(st_ptr + 2 * stride_state, xsum)
        tl.store(st_ptr + 3 * stride_state, squares)
        tl.store(st_ptr + 4 * stride_state, zsum)
    tl.store(st_ptr, ref)
    tl.store(st_ptr + stride_state, old_sum * rescale + tl.sum(e, axis=0))
    tl.store(st_ptr + 8 * stride_state, rescale)
    if STORE_EXP:
        tl.store(row_ptr + offs_v, (e * slope).to(tile_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=["first_col"])
def _linear_logprob_gradient_kernel(
    # pointers
    tile_ptr,  # [m, n]
    bias_ptr,  # [n] fp32
    targets_ptr,  # [m] int64
    coefs_ptr,  # [5, m] fp32
    # strides and sizes
    stride_tile,
    stride_coefs,
    first_col,
    n_cols,
    # scalars
    logit_scale,
    softcap,
    inv_temperature,
    # flags
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (m, cdiv(n, BLOCK_V)): program (r, b) overwrites block b of row r with d loss / d y."""
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    mask_v = offs_v < n_cols
    ptrs = tile_ptr + row * stride_tile + offs_v
    lse = tl.load(coefs_ptr + row)
    constant = tl.load(coefs_ptr + stride_coefs + row)
    linear = tl.load(coefs_ptr + 2 * stride_coefs + row)
    uniform = tl.load(coefs_ptr + 3 * stride_coefs + row)
    at_target = tl.load(coefs_ptr + 4 * stride_coefs + row)
    local = (tl.load(targets_ptr + row) - first_col).to(tl.int64)

    y = tl.load(ptrs, mask=mask_v, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)
    z, slope = _transform(y, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
    p = tl.exp(z - lse)
    # d loss / d z_v = p_v (constant + linear z_v) + uniform
    g = (p * (constant + linear * z) + uniform) * slope * (logit_scale * inv_temperature)
    g = tl.where(offs_v == local, at_target, g)
    tl.store(ptrs, g.to(tile_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def _linear_logprob_significant_kernel(
    # pointers
    tile_ptr,  # [m, n] gradients
    factors_ptr,  # [m] fp32
    marks_ptr,  # [n] int8, zeros
    # strides and sizes
    stride_tile,
    n_cols,
    BLOCK_V: tl.constexpr,
):
    """Grid (m, cdiv(n, BLOCK_V)): program (r, b) marks the columns of block b that row r makes
    significant. Programs of one column race to write the same 1."""
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < n_cols
    g = tl.load(tile_ptr + row * stride_tile + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    # written so that a NaN is significant
    found = ~(tl.abs(g) * tl.load(factors_ptr + row) <= 1.0)
    tl.store(marks_ptr + offs_v, found.to(tl.int8), mask=mask_v & found)


@triton.jit
def _linear_logprob_rescale_kernel(
    acc_ptr,  # [m, n] fp32, contiguous
    rescale_ptr,  # [m] fp32
    n_cols,
    BLOCK_N: tl.constexpr,
):
    """Grid (m,): program r multiplies row r by its factor, and reads nothing if that is 1."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(rescale_ptr + row)
    if factor != 1.0:
        for start in range(0, n_cols, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < n_cols
            ptrs = acc_ptr + row * n_cols + offs_n
            tl.store(ptrs, tl.load(ptrs, mask=mask_n, other=0.0) * factor, mask=mask_n)


def fold(
    tile: Tensor,
    state: Tensor,
    targets: Tensor,
    first_col: int,
    bias: Tensor | None,
    transform: LogitTransform,
    *,
    moments: bool,
    top1: bool,
    store_exp: bool,
) -> None:
    """See `_vocab_passes.fold`."""
    rows, cols = tile.shape
    assert tile.stride(1) == 1 and state.stride(1) == 1 and cols <= MAX_FOLD_COLS
    block_v = max(16, triton.next_power_of_2(cols))
    _linear_logprob_fold_kernel[(rows,)](
        tile,
        state if bias is None else bias,
        targets,
        state,
        tile.stride(0),
        state.stride(0),
        first_col,
        cols,
        transform.logit_scale,
        1.0 if transform.softcap is None else transform.softcap,
        1.0 / transform.temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=transform.softcap is not None,
        HAS_MOMENTS=moments,
        HAS_TOP1=top1,
        STORE_EXP=store_exp,
        MAX_LAG=30.0,
        BLOCK_V=block_v,
        # At least 8 columns a thread, so that a narrow last tile loads 128 bits at a time too, also
        # in AMD's waves of 64 threads.
        num_warps=max(1, min(8, block_v // 512)),
    )


def gradient(
    tile: Tensor,
    coefs: Tensor,
    targets: Tensor,
    first_col: int,
    bias: Tensor | None,
    transform: LogitTransform,
) -> None:
    """See `_vocab_passes.gradient`."""
    rows, cols = tile.shape
    assert tile.stride(1) == 1 and coefs.stride(1) == 1
    _linear_logprob_gradient_kernel[(rows, triton.cdiv(cols, GRADIENT_BLOCK))](
        tile,
        coefs if bias is None else bias,
        targets,
        coefs,
        tile.stride(0),
        coefs.stride(0),
        first_col,
        cols,
        transform.logit_scale,
        1.0 if transform.softcap is None else transform.softcap,
        1.0 / transform.temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=transform.softcap is not None,
        BLOCK_V=GRADIENT_BLOCK,
        num_warps=4,
    )


def significant(tile: Tensor, factors: Tensor) -> Tensor:
    """See `_vocab_passes.significant`."""
    rows, cols = tile.shape
    assert tile.stride(1) == 1 and factors.is_contiguous()
    marks = torch.zeros(cols, dtype=torch.int8, device=tile.device)
    _linear_logprob_significant_kernel[(rows, triton.cdiv(cols, GRADIENT_BLOCK))](
        tile,
        factors,
        marks,
        tile.stride(0),
        cols,
        BLOCK_V=GRADIENT_BLOCK,
        num_warps=4,
    )
    return marks.bool()


def multiply_accumulate(
    acc: Tensor,
    a: Tensor,
    b: Tensor,
    scratch: Tensor | None,
    rescale: Tensor | None = None,
) -> None:
    """See `_vocab_passes.multiply_accumulate`; on CUDA the GEMM itself adds to fp32 `acc`."""
    if rescale is not None:
        assert acc.is_contiguous()
        _linear_logprob_rescale_kernel[(acc.shape[0],)](
            acc, rescale, acc.shape[1], BLOCK_N=RESCALE_BLOCK, num_warps=4
        )
    if scratch is not None:
        torch.mm(a, b, out=scratch)
        acc.add_(scratch)
    elif a.dtype == acc.dtype:
        torch.addmm(acc, a, b, out=acc)
    else:
        torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
