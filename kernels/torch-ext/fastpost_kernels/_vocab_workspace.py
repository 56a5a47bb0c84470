"""Upper bounds of the bytes that the walks over vocabulary tiles keep alive.

Peak beyond arguments and results, with m rows and n columns in a tile, s bytes per GEMM element:

    m n s                         the tile, at most `memory_budget`
    + m H (4 + s)                 accumulator of a frozen head, inside the budget too
    + M H (4 + s)                 d hidden, recomputed backward only
    + m H (copies)                rows of hidden and of the head at the targets, gathered and cast
    + n H (4 + s)                 one slice of d weight or of a cast weight
    + m STRIP s                   columns of the tile, transposed for d weight
    + O(M + V)                    row statistics, bias
    + O(r (M + V + H))            an adapter of rank r: u, G B, d A, d B, B cast
    + n H (4 + s)                 kept rows of a filtered slice, and the slice's gradient
    + constants                   a few megabytes of block temporaries

Nothing grows as M V unless the budget pays for it (`linear_cross_entropy`, three GEMMs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._choices import CHOICES, choose, weight_shape
from ._device import resolve_backend
from ._transposed_product import STRIP
from ._vocab_passes import BLOCK_ELEMENTS
from ._vocab_tiles import TILE_ROWS, statistics_dtype, tile_shape

__all__ = [
    "HeadSize",
    "fold_plan",
    "fold_workspace",
    "recompute_plan",
    "recompute_workspace",
    "resident_workspace",
]

# fp32 temporaries alive at once: vectors of [M], and blocks of BLOCK_ELEMENTS by backend.
ROW_VECTORS = 48
BLOCKS = {"torch": 10, "cpp": 3, "triton": 3}


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
    rank: int = 0  # of an adapter; 0 is none
    filtered: bool = False
    device: torch.device | None = None
    casts_hidden: bool = True
    casts_weight: bool = True

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        backend: str,
        dtype: torch.dtype,
        budget: int,
        lora_a: Tensor | None = None,
        filter_eps: float | None = None,
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
            backend if backend != "auto" else resolve_backend("auto", hidden.device, dtype),
            budget,
            0 if lora_a is None else lora_a.shape[0],
            filter_eps is not None,
            hidden.device,
            hidden.dtype != dtype,
            weight.dtype != dtype,
        )


def fold_plan(
    rows: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    with_acc: bool,
    budget: int,
    device: torch.device | None = None,
) -> tuple[int, int]:
    """(rows, columns) of a fold's tile; a frozen head's accumulator shares the budget.

    On the `device` of such a fold the tile is the one that was measured best, if any was.
    """
    itemsize, most_rows, most_cols = dtype.itemsize, TILE_ROWS, None
    row_bytes = width * (statistics_dtype(dtype).itemsize + itemsize) if with_acc else 0
    if with_acc and device is not None:
        option = choose("head_tile", device, weight_shape(width, vocab, dtype))
        if option != CHOICES["head_tile"][0]:
            most_rows, most_cols = (int(size) for size in option.split("x"))
    return tile_shape(min(rows, most_rows), vocab, row_bytes, itemsize, budget, most_cols)


def recompute_plan(
    rows: int, vocab: int, itemsize: int, filtered: bool, budget: int
) -> tuple[int, int]:
    """(rows, columns) of a recomputed tile; the copy of a filtered tile shares the budget."""
    return tile_shape(rows, vocab, 0, itemsize * (1 + filtered), budget)


def _common(size: HeadSize, chunk: int, cols: int) -> int:
    """Gathered and cast rows of hidden, a cast weight tile, bias, vectors and blocks."""
    copies = chunk * size.width * (size.hidden_bytes + size.gemm_bytes * size.casts_hidden)
    cast_weight = cols * size.width * size.gemm_bytes * size.casts_weight
    numbers = ROW_VECTORS * size.rows + size.vocab + BLOCKS[size.backend] * BLOCK_ELEMENTS
    return copies + cast_weight + numbers * size.wide_bytes + _adapter(size, chunk, cols)


def _adapter(size: HeadSize, chunk: int, cols: int) -> int:
    """A and B cast, u and sums of coefficients times B; gradients of A and B in both precisions."""
    wide, narrow = size.wide_bytes, size.gemm_bytes
    rows = size.rows * (wide + narrow) + chunk * (4 * wide + 2 * narrow)
    thin = rows + (size.vocab + size.width) * 2 * (wide + narrow) + cols * (wide + narrow)
    return size.rank * thin


def _target_rows(size: HeadSize, chunk: int) -> int:
    return chunk * size.width * (size.weight_bytes + size.gemm_bytes)


def fold_workspace(size: HeadSize, dtype: torch.dtype, with_acc: bool) -> int:
    """Bytes of the forward: statistics, and the frozen head's accumulator if `with_acc`."""
    chunk, cols = fold_plan(
        size.rows, size.vocab, size.width, dtype, with_acc, size.budget, size.device
    )
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
        total += chunk * min(cols, STRIP) * size.gemm_bytes  # a part of the tile, transposed
    if need_bias:
        total += size.vocab * size.wide_bytes
    if size.filtered:  # the tile's kept columns, their rows of the weight and of its gradient
        total += chunk * cols * size.gemm_bytes
        total += cols * size.width * (size.wide_bytes + size.gemm_bytes)
    return total


def recompute_workspace(size: HeadSize, needs: tuple[bool, bool, bool]) -> int:
    """Bytes of a backward that recomputes its tiles."""
    chunk, cols = recompute_plan(size.rows, size.vocab, size.gemm_bytes, size.filtered, size.budget)
    return chunk * cols * size.gemm_bytes + gradient_workspace(size, chunk, cols, needs)


def resident_workspace(
    size: HeadSize, chunk: int, logits: int, cols: int, needs: tuple[bool, bool, bool]
) -> int:
    """Bytes of the walk that keeps all `logits` elements of `chunk` rows, in tiles of `cols`
    columns."""
    total = logits * size.gemm_bytes + _target_rows(size, chunk)
    return total + gradient_workspace(size, chunk, cols, needs)
