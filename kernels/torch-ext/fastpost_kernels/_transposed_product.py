"""a^T b of 16-bit CPU matrices, through a transposed copy of a where that is faster.

A library's 16-bit GEMM packs a transposed left operand element by element. With AMX the product is
so fast that the packing is more than half of it; a copy that is transposed first costs far less.
Without AMX both take the same time, and nothing is copied.

Legend: M rows, N columns of a, K columns of b.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._csrc import library, num_threads
from ._layer_passes import rows_of

__all__ = ["STRIP", "copies_pay", "has_matrix_unit", "transposed", "transposed_product"]

# Columns of a that are copied at a time; products narrower than this were not measured faster.
STRIP = 2048


@functools.cache
def has_matrix_unit() -> bool:
    """Whether this CPU multiplies bf16 in AMX tiles."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def copies_pay(a: Tensor) -> bool:
    """Whether `transposed_product` copies strips of `a` [M, N]."""
    return (
        a.device.type == "cpu"
        and a.dtype == torch.bfloat16
        and a.shape[1] >= STRIP
        and has_matrix_unit()
        and library() is not None
    )


def transposed(matrix: Tensor) -> Tensor:
    """A contiguous copy [N, M] of a 16-bit CPU `matrix` [M, N] transposed."""
    lib = library()
    assert lib is not None
    matrix = rows_of(matrix)
    rows, cols = matrix.shape
    out = matrix.new_empty(cols, rows)
    lib.fastpost_transpose_16(
        matrix.data_ptr(), matrix.stride(0), rows, cols, out.data_ptr(), rows, num_threads()
    )
    return out


def transposed_product(a: Tensor, b: Tensor, out: Tensor) -> None:  # [M, N], [M, K], [N, K]
    """out = a^T b."""
    if not copies_pay(a):
        torch.mm(a.t(), b, out=out)
        return
    for first in range(0, a.shape[1], STRIP):
        strip = slice(first, first + STRIP)
        torch.mm(transposed(a[:, strip]), b, out=out[strip])
