# mypy: disable-error-code="no-untyped-def"
# (arguments of jit functions are pointers and constexprs, which have no Python types)
"""The passes of `_adapter_passes.py` as Triton kernels, bound by memory bandwidth.

d scale is summed over blocks of rows in order, then over the blocks: equal in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._philox import ROUNDS

__all__: list[str] = []

DROPOUT_BLOCK = 1024  # columns
SCALE_ROWS, SCALE_COLS = 16, 256
PARTIAL_ROWS = 512  # of one program of the backward


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def _adapter_dropout_kernel(
    x_ptr,
    out_ptr,
    stride_x,
    stride_out,
    width,
    seed_low,
    seed_high,
    threshold,
    scale,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    quads = first // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros_like(quads).to(tl.uint32)
    seed = (seed_high.to(tl.uint64) << 32) | seed_low.to(tl.uint64)
    w0, w1, w2, w3 = tl.philox(
        seed,
        quads.to(tl.uint32),
        zero + (row & 0xFFFFFFFF).to(tl.uint32),
        zero + (row >> 32).to(tl.uint32),
        zero,
        n_rounds=ROUNDS,
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.uint32)
    cols = first + tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
    kept = tl.where(words >= threshold.to(tl.uint32), x * tl.cast(scale, tl.float32), 0.0)
    out_ptrs = out_ptr + row * stride_out + cols
    tl.store(out_ptrs, kept.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _column_scale_forward_kernel(
    z_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    stride_z,
    stride_out,
    rows,
    width,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (blocks of rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row[:, None] < rows) & (cols[None, :] < width)
    scale = tl.load(scale_ptr + cols, mask=cols < width, other=0.0)
    z = tl.load(z_ptr + row[:, None] * stride_z + cols[None, :], mask=inside, other=0.0)
    y = z.to(tl.float32) * scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < width, other=0.0)[None, :]
    out_ptrs = out_ptr + row[:, None] * stride_out + cols[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _column_scale_backward_kernel(
    grad_ptr,
    z_ptr,
    scale_ptr,
    d_z_ptr,
    partials_ptr,  # [programs, width] fp32
    stride_grad,
    stride_z,
    stride_d_z,
    rows,
    width,
    NEED_Z: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (blocks of PARTIAL_ROWS rows, blocks of columns)."""
    first = tl.program_id(0).to(tl.int64) * PARTIAL_ROWS
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + cols, mask=cols < width, other=0.0)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, PARTIAL_ROWS, BLOCK_M):
        row = first + start + tl.arange(0, BLOCK_M)
        inside = (row[:, None] < rows) & (cols[None, :] < width)
        grad_ptrs = grad_ptr + row[:, None] * stride_grad + cols[None, :]
        grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
        if NEED_SCALE:
            z = tl.load(z_ptr + row[:, None] * stride_z + cols[None, :], mask=inside, other=0.0)
            sums += tl.sum(grad * z.to(tl.float32), 0)
        if NEED_Z:
            d_z_ptrs = d_z_ptr + row[:, None] * stride_d_z + cols[None, :]
            tl.store(d_z_ptrs, (grad * scale[None, :]).to(d_z_ptr.dtype.element_ty), mask=inside)
    if NEED_SCALE:
        partial = tl.program_id(0).to(tl.int64) * width
        tl.store(partials_ptr + partial + cols, sums, mask=cols < width)


def dropout(x: Tensor, seed: int, threshold: int, scale: float) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    out = x.new_empty(rows, width)
    if out.numel():
        _adapter_dropout_kernel[(rows, triton.cdiv(width, DROPOUT_BLOCK))](
            x,
            out,
            x.stride(0),
            out.stride(0),
            width,
            seed & 0xFFFFFFFF,
            seed >> 32 & 0xFFFFFFFF,
            threshold,
            scale,
            ROUNDS=ROUNDS,
            BLOCK=DROPOUT_BLOCK,
        )
    return out


def column_scale_forward(
    z: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    z, scale = z if z.stride(1) == 1 else z.contiguous(), scale.contiguous()
    rows, width = z.shape
    out = z.new_empty(rows, width) if out is None else out
    if out.numel():
        grid = (triton.cdiv(rows, SCALE_ROWS), triton.cdiv(width, SCALE_COLS))
        _column_scale_forward_kernel[grid](
            z,
            scale,
            scale if bias is None else bias,
            out,
            z.stride(0),
            out.stride(0),
            rows,
            width,
            HAS_BIAS=bias is not None,
            BLOCK_M=SCALE_ROWS,
            BLOCK_N=SCALE_COLS,
        )
    return out


def column_scale_backward(
    grad: Tensor, z: Tensor | None, scale: Tensor, need_z: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad, scale = grad if grad.stride(1) == 1 else grad.contiguous(), scale.contiguous()
    rows, width = grad.shape
    d_z = grad.new_empty(rows, width) if need_z else None
    need_scale = z is not None
    z = grad if z is None else (z if z.stride(1) == 1 else z.contiguous())
    blocks = triton.cdiv(rows, PARTIAL_ROWS)
    partials = torch.empty(
        blocks if need_scale else 0, width, dtype=torch.float32, device=grad.device
    )
    if grad.numel():
        _column_scale_backward_kernel[(blocks, triton.cdiv(width, SCALE_COLS))](
            grad,
            z,
            scale,
            grad if d_z is None else d_z,
            partials,
            grad.stride(0),
            z.stride(0),
            width if d_z is None else d_z.stride(0),
            rows,
            width,
            NEED_Z=need_z,
            NEED_SCALE=need_scale,
            PARTIAL_ROWS=PARTIAL_ROWS,
            BLOCK_M=SCALE_ROWS,
            BLOCK_N=SCALE_COLS,
        )
    return d_z, partials.sum(0) if need_scale else None
