"""Upper bounds of the bytes that the walks over vocabulary tiles keep alive.

Peak beyond arguments and results, with m rows and n columns in a tile, s bytes per GEMM element:

    m n s                         the tile, at most `memory_budget`
    + m H (4 + s)                 accumulator of a frozen head, inside the budget too
    + M H (4 + s)                 d hidden, recomputed backward only
    + m H (copies)                rows of hidden and of the head at the targets, gathered and cast
    + n H (4 + s)                 one slice of d weight or of a cast weight
    + O(M + V)                    row statistics, bias
    + constants                   a few megabytes of block temporaries

Nothing grows as M V unless the budget pays for it (`linear_cross_entropy`, three GEMMs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._vocab_passes import BLOCK_ELEMENTS
from ._vocab_tiles import TILE_ROWS, statistics_dtype, tile_shape

__all__ = [
    "HeadSize",
    "fold_plan",
    "fold_workspace",
    "recompute_workspace",
    "resident_workspace",
]

# fp32 temporaries alive at once: vectors of [M], and blocks of BLOCK_ELEMENTS by backend.
ROW_VECTORS = 48
BLOCKS = {"auto": 10, "torch": 10, "cpp": 3, "triton": 3}


class HeadSize(NamedTuple):
    """What the formulas read from an op's arguments."""

    rows: int
    vocab: int
    width: int
    hidden_bytes: int  # per element
    weight_bytes: int
    gemm_bytes: int
    wide_bytes: int  # statistics and accumulators
    backend: str
    budget: int

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, backend: str, dtype: torch.dtype, budget: int
    ) -> HeadSize:
        vocab, width = weight.shape
        return cls(
            hidden.shape[0],
            vocab,
            width,
            hidden.dtype.itemsize,
            weight.dtype.itemsize,
            dtype.itemsize,
            statistics_dtype(dtype).itemsize,
            backend,
            budget,
        )


def fold_plan(
    rows: int, vocab: int, width: int, dtype: torch.dtype, with_acc: bool, budget: int
) -> tuple[int, int]:
    """(rows, columns) of a fold's tile; a frozen head's accumulator shares the budget."""
    row_bytes = width * (statistics_dtype(dtype).itemsize + dtype.itemsize) if with_acc else 0
    return tile_shape(min(rows, TILE_ROWS), vocab, row_bytes, dtype.itemsize, budget)


def _common(size: HeadSize, chunk: int, cols: int) -> int:
    """Gathered and cast rows of hidden, a cast weight tile, bias, vectors and blocks."""
    copies = chunk * size.width * (size.hidden_bytes + size.gemm_bytes)
    cast_weight = cols * size.width * size.gemm_bytes
    numbers = ROW_VECTORS * size.rows + size.vocab + BLOCKS[size.backend] * BLOCK_ELEMENTS
    return copies + cast_weight + numbers * size.wide_bytes


def _target_rows(size: HeadSize, chunk: int) -> int:
    return chunk * size.width * (size.weight_bytes + size.gemm_bytes)


def fold_workspace(size: HeadSize, dtype: torch.dtype, with_acc: bool) -> int:
    """Bytes of the forward: statistics, and the frozen head's accumulator if `with_acc`."""
    chunk, cols = fold_plan(size.rows, size.vocab, size.width, dtype, with_acc, size.budget)
    total = chunk * cols * size.gemm_bytes
    if with_acc:
        # the accumulator, its rounding scratch, and its values on their way to scattered rows
        total += chunk * size.width * (size.wide_bytes + 2 * size.gemm_bytes)
        total += chunk * size.width * size.hidden_bytes
    return total + _common(size, chunk, cols) + _target_rows(size, chunk)


def gradient_workspace(
    size: HeadSize, chunk: int, cols: int, needs: tuple[bool, bool, bool]
) -> int:
    """Bytes of `TileGradients` and of what surrounds it, tiles apart."""
    need_hidden, need_weight, need_bias = needs
    total = _common(size, chunk, cols)
    if need_hidden:
        # the accumulator, its rounding scratch, and its values on their way to scattered rows
        total += size.rows * size.width * (size.wide_bytes + size.hidden_bytes)
        total += chunk * size.width * size.gemm_bytes
    if need_weight:
        total += cols * size.width * (size.wide_bytes + size.gemm_bytes)
    if need_bias:
        total += size.vocab * size.wide_bytes
    return total


def recompute_workspace(size: HeadSize, needs: tuple[bool, bool, bool]) -> int:
    """Bytes of a backward that recomputes its tiles."""
    chunk, cols = tile_shape(size.rows, size.vocab, 0, size.gemm_bytes, size.budget)
    return chunk * cols * size.gemm_bytes + gradient_workspace(size, chunk, cols, needs)


def resident_workspace(
    size: HeadSize, logits: int, cols: int, needs: tuple[bool, bool, bool]
) -> int:
    """Bytes of the walk that keeps all `logits` elements, in tiles of `cols` columns."""
    total = logits * size.gemm_bytes + _target_rows(size, size.rows)
    return total + gradient_workspace(size, size.rows, cols, needs)
