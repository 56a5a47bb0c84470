# mypy: disable-error-code="no-untyped-def"
# (arguments of jit functions are pointers and constexprs, which have no Python types)
"""C = X Y + U V + bias in one kernel: a GEMM whose inner dimension goes on over a second pair.

This is LoRA's forward (X x, Y = W^T, U = s x A^T, V = B^T) and its d x (X dy, Y = W, U = s dy B,
V = A): the result is accumulated in fp32 registers over both pairs and written once, where two
library GEMMs write it, read it back and write it again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__: list[str] = []

# 8 x 2 warps of a Hopper SM hold 128 x 256 accumulators in half of their registers; the other
# processors take 128 x 128.
BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M = 128, 128, 64, 8
NUM_WARPS, NUM_STAGES = 8, 3


@triton.jit
def _accumulate(
    acc,
    left_ptr,
    right_ptr,
    rows,
    cols,
    row_limit,
    col_limit,
    inner,
    stride_left,
    stride_right_k,
    stride_right_n,
    IEEE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + left[rows] right[:, cols] over `inner`."""
    stride_right_k = tl.cast(stride_right_k, tl.int64)
    k = tl.arange(0, BLOCK_K)
    left_ptrs = left_ptr + rows[:, None] * stride_left + k[None, :]
    right_ptrs = right_ptr + k[:, None] * stride_right_k + cols[None, :] * stride_right_n
    for start in range(0, inner, BLOCK_K):
        left_k = k[None, :] < inner - start
        right_k = k[:, None] < inner - start
        left = tl.load(left_ptrs, mask=(rows[:, None] < row_limit) & left_k, other=0.0)
        right = tl.load(right_ptrs, mask=(cols[None, :] < col_limit) & right_k, other=0.0)
        if IEEE:
            acc = tl.dot(left, right, acc, input_precision="ieee")
        else:
            acc = tl.dot(left, right, acc)
        left_ptrs += BLOCK_K
        right_ptrs += BLOCK_K * stride_right_k
    return acc


@triton.jit
def _extended_gemm_kernel(
    x_ptr,  # [rows, inner]
    y_ptr,  # [inner, width] by its strides
    u_ptr,  # [rows, rank]
    v_ptr,  # [rank, width] by its strides
    bias_ptr,  # [width]
    out_ptr,  # [rows, width]
    rows,
    width,
    inner,
    rank,
    stride_x,
    stride_y_k,
    stride_y_n,
    stride_u,
    stride_v_k,
    stride_v_n,
    stride_out,
    HAS_BIAS: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (blocks of rows x blocks of columns,), in groups of GROUP_M row blocks for the L2."""
    pid = tl.program_id(0)
    row_blocks, col_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    group = pid // (GROUP_M * col_blocks)
    group_rows = min(row_blocks - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * col_blocks)
    row_block = group * GROUP_M + within % group_rows
    col_block = within // group_rows
    m = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = col_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _accumulate(
        acc, x_ptr, y_ptr, m, n, rows, width, inner, stride_x, stride_y_k, stride_y_n, IEEE, BLOCK_K
    )
    acc = _accumulate(
        acc, u_ptr, v_ptr, m, n, rows, width, rank, stride_u, stride_v_k, stride_v_n, IEEE, BLOCK_K
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m[:, None] * stride_out + n[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < width)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


def extended_gemm(x: Tensor, y: Tensor, u: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] @ y [K, N] + u [M, r] @ v [r, N] + bias [N]; y and v may be transposed views."""
    x = x if x.stride(1) == 1 else x.contiguous()
    u = u if u.stride(1) == 1 else u.contiguous()
    (rows, inner), width = x.shape, y.shape[1]
    out = x.new_empty(rows, width)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(rows, BLOCK_M) * triton.cdiv(width, BLOCK_N),)
    _extended_gemm_kernel[grid](
        x,
        y,
        u,
        v,
        x if bias is None else bias,
        out,
        rows,
        width,
        inner,
        u.shape[1],
        x.stride(0),
        *y.stride(),
        u.stride(0),
        *v.stride(),
        out.stride(0),
        HAS_BIAS=bias is not None,
        IEEE=x.dtype == torch.float32,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        GROUP_M=GROUP_M,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out
