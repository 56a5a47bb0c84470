# mypy: disable-error-code="no-untyped-def"
# (arguments of jit functions are pointers and constexprs, which have no Python types)
"""4-bit NormalFloat on GPUs: unpacking to memory, and a GEMM that unpacks as it goes.

The level of a nibble is picked by 15 selects: a table in memory would be 32 scattered loads a warp.
The GEMM is for few rows, where reading the weight is all the time there is: 4 bits are read instead
of 16 bits written and read. With many rows every block of rows would unpack the weight again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__: list[str] = []

UNPACK_BYTES = 2048
GEMM_COLS, GEMM_INNER = 64, 128  # outputs and inputs of one step


@triton.jit
def _level(index):
    """NF4_LEVELS[index] of 4-bit integers, as float32."""
    one, two = (index & 1) != 0, (index & 2) != 0
    four, eight = (index & 4) != 0, (index & 8) != 0
    a = tl.where(one, -0.6961928009986877, -1.0)
    b = tl.where(one, -0.39491748809814453, -0.5250730514526367)
    c = tl.where(one, -0.18477343022823334, -0.28444138169288635)
    d = tl.where(one, 0.0, -0.09105003625154495)
    e = tl.where(one, 0.16093020141124725, 0.07958029955625534)
    f = tl.where(one, 0.33791524171829224, 0.24611230194568634)
    g = tl.where(one, 0.5626170039176941, 0.44070982933044434)
    h = tl.where(one, 1.0, 0.7229568362236023)
    low = tl.where(four, tl.where(two, d, c), tl.where(two, b, a))
    high = tl.where(four, tl.where(two, h, g), tl.where(two, f, e))
    return tl.where(eight, high, low)


@triton.jit
def _nf4_unpack_kernel(
    packed_ptr,  # bytes
    absmax_ptr,
    out_ptr,  # [runs, length]
    first_byte,
    stride_bytes,
    length_bytes,
    stride_out,
    BLOCK_SIZE: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Grid (runs, pieces of BYTES bytes of a run); runs begin with whole blocks of the format."""
    HALF: tl.constexpr = BLOCK_SIZE // 2  # bytes of a block
    BLOCKS: tl.constexpr = BYTES // HALF
    run = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BYTES
    block = tl.arange(0, BLOCKS)
    byte = begin + block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    source = tl.cast(first_byte, tl.int64) + run * stride_bytes
    packed = tl.load(packed_ptr + source + byte, mask=byte < length_bytes, other=0).to(tl.int32)
    absmax_ptrs = absmax_ptr + source // HALF + begin // HALF + block
    scale = tl.load(absmax_ptrs, mask=begin + block * HALF < length_bytes, other=0.0)[:, None]
    values = tl.interleave(_level(packed >> 4) * scale, _level(packed & 15) * scale)
    column = 2 * begin + block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    out_ptrs = out_ptr + run * stride_out + column
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=column < 2 * length_bytes)


@triton.jit
def _nf4_gemm_kernel(
    x_ptr,  # [rows, inner]
    packed_ptr,  # [width, inner / 2] bytes
    absmax_ptr,
    bias_ptr,
    out_ptr,  # [rows, width]
    rows,
    width,
    inner,
    stride_x,
    stride_out,
    HAS_BIAS: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks of columns, blocks of rows). The weight is the left operand: it goes from the
    registers that it is unpacked in to the tensor cores, and its 64 rows fill them."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    half = tl.arange(0, BLOCK_K // 2)
    first = n * inner
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, inner, BLOCK_K):
        x_ptrs = x_ptr + m[None, :] * stride_x + (start + k)[:, None]
        x_inside = (m[None, :] < rows) & (start + k < inner)[:, None]
        x = tl.load(x_ptrs, mask=x_inside, other=0.0)
        byte = (first // 2)[:, None] + (start // 2 + half)[None, :]
        inside = (n[:, None] < width) & (start + 2 * half < inner)[None, :]
        packed = tl.load(packed_ptr + byte, mask=inside, other=0).to(tl.int32)
        scale = tl.load(absmax_ptr + byte // (BLOCK_SIZE // 2), mask=inside, other=0.0)
        weight = tl.interleave(_level(packed >> 4) * scale, _level(packed & 15) * scale)
        if IEEE:
            acc = tl.dot(weight, x, acc, input_precision="ieee")
        else:
            acc = tl.dot(weight.to(x.dtype), x, acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + m[None, :] * stride_out + n[:, None]
    out_inside = (m[None, :] < rows) & (n[:, None] < width)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_inside)


def unpack(
    packed: Tensor, absmax: Tensor, block_size: int, first: int, stride: int, out: Tensor
) -> None:
    """`out` [runs, length]: elements from first + run * stride, whole blocks; `length` is even."""
    runs, length = out.shape
    if out.numel() == 0:
        return
    _nf4_unpack_kernel[(runs, triton.cdiv(length // 2, UNPACK_BYTES))](
        packed,
        absmax,
        out,
        first // 2,
        stride // 2,
        length // 2,
        out.stride(0),
        BLOCK_SIZE=block_size,
        BYTES=UNPACK_BYTES,
    )


def multiply(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    block_size: int,
    width: int,
    bias: Tensor | None,
) -> Tensor:
    """x [rows, inner] times the weight [width, inner] transposed, plus bias; `inner` even."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, inner = x.shape
    out = x.new_empty(rows, width)
    if out.numel() == 0:
        return out
    block_rows = max(16, min(64, triton.next_power_of_2(rows)))
    grid = (triton.cdiv(width, GEMM_COLS), triton.cdiv(rows, block_rows))
    _nf4_gemm_kernel[grid](
        x,
        packed,
        absmax,
        x if bias is None else bias,
        out,
        rows,
        width,
        inner,
        x.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        IEEE=x.dtype == torch.float32,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_rows,
        BLOCK_N=GEMM_COLS,
        BLOCK_K=GEMM_INNER,
        num_warps=4,
        num_stages=3,
    )
    return out
