"""What a LoRA adapter adds to the walks over vocabulary tiles: projections and gradients.

With G = d loss / d y [m, V] and u = s h A^T:

    d h += s (G B) A,    d A = s (G B)^T h,    d B = G^T u

G B [m, r] and G^T u [V, r] are two thin GEMMs per tile of G; d h and d A follow from G B once all
tiles were seen. Neither W + s B A nor a gradient of W exists.
Legend: M rows, m scored rows or a chunk of them, H hidden, V vocabulary, n columns, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._lora_head import LowRankRows
from ._vocab_passes import blocks
from ._vocab_tiles import Head, ScoredRows, TargetLogits, combine_target, gemm_rows

__all__ = ["LowRankGradients", "combine_frozen", "project", "project_all"]


def project(head: Head, hidden: Tensor, *, with_acc: bool = False) -> LowRankRows | None:
    """u of a chunk of rows, `hidden` [m, H] as the GEMMs take it; None without an adapter."""
    if head.lora is None:
        return None
    a = head.lora.a.to(head.compute_dtype)
    exact = head.stats(hidden.shape[0], a.shape[0])
    if head.needs_scratch:  # CPU GEMMs round 16-bit products: multiply in the statistics' dtype
        wide = a.to(head.stats_dtype)
        starts = blocks(*hidden.shape)
        for start in starts:
            part = slice(start, start + starts.step)
            torch.mm(hidden[part].to(head.stats_dtype), wide.t(), out=exact[part])
    else:
        head.passes.multiply_accumulate(exact, hidden, a.t(), None)
    exact *= head.lora.scale
    acc = head.stats(*exact.shape) if with_acc else None
    return LowRankRows(exact, exact.to(head.compute_dtype), acc)


def project_all(head: Head, rows: ScoredRows, chunk: int) -> Tensor | None:
    """u of every scored row, [m, r] as the GEMMs multiply it, made chunk by chunk."""
    if head.lora is None:
        return None
    found = head.empty(rows.count, head.lora.a.shape[0])
    for start, end in rows.chunks(chunk):
        low_rank = project(head, gemm_rows(head, rows.take(head.hidden, start, end)))
        assert low_rank is not None
        found[start:end] = low_rank.factor
    return found


def combine_frozen(
    head: Head,
    target: TargetLogits,
    low_rank: LowRankRows | None,
    target_factor: Tensor,  # [m]
    acc: Tensor,  # [m, H]
    acc_factor: Tensor,  # [m]
) -> Tensor:
    """A frozen head's gradient from the sums of a fold, in place in `acc`: `combine_target` with W,
    and with B times s A."""
    combine_target(target.weight, target_factor, acc, acc_factor)
    if low_rank is not None:
        assert head.lora is not None and low_rank.acc is not None and target.lora_b is not None
        combine_target(target.lora_b, target_factor, low_rank.acc, acc_factor)
        low_rank.acc.mul_(head.lora.scale)
        left, right = low_rank.acc.to(head.compute_dtype), head.lora.a.to(head.compute_dtype)
        scratch = head.empty(*acc.shape) if head.needs_scratch else None
        head.passes.multiply_accumulate(acc, left, right, scratch)
    return acc


class LowRankGradients:
    """Collects G B and d B from gradient tiles, then d A and the adapter's part of d hidden."""

    def __init__(
        self, head: Head, rows: int, longest: int, need_a: bool, need_b: bool, need_hidden: bool
    ) -> None:
        """`longest` is the largest number of rows or columns in a tile."""
        assert head.lora is not None
        rank, width = head.lora.a.shape
        self.head, self.lora = head, head.lora
        self.g_b = head.stats(rows, rank) if need_hidden or need_a else None
        self.b = head.stats(head.lora.b.shape[0], rank) if need_b else None
        self.a = head.stats(rank, width) if need_a else None
        self.scratch = head.empty(longest, rank) if head.needs_scratch else None
        self.wide_scratch = head.empty(rank, width) if need_a and head.needs_scratch else None

    def add(
        self,
        tile: Tensor,  # [m, n]
        lora_b: Tensor,  # [n, r]
        factor: Tensor,  # [m, r]: u
        row: int,
        first: int,
        columns: Tensor | None,
    ) -> None:
        """Rows [row, row + m), columns first + `columns` (None: the n from `first` on)."""
        rows, cols = tile.shape
        accumulate = self.head.passes.multiply_accumulate
        if self.g_b is not None:
            scratch = None if self.scratch is None else self.scratch[:rows]
            accumulate(self.g_b[row : row + rows], tile, lora_b, scratch)
        if self.b is not None:
            scratch = None if self.scratch is None else self.scratch[:cols]
            if columns is None:
                accumulate(self.b[first : first + cols], tile.t(), factor, scratch)
            else:
                product = self.head.stats(cols, factor.shape[1])
                accumulate(product, tile.t(), factor, scratch)
                self.b.index_add_(0, columns + first, product)

    def end_rows(
        self, hidden: Tensor, row: int, d_hidden: Tensor | None, scratch: Tensor | None
    ) -> None:
        """All tiles of rows [row, row + m) were added: `hidden` [m, H] gives d A, and `d_hidden`
        [m, H] receives its part."""
        if self.g_b is None:
            return
        scaled = self.g_b[row : row + hidden.shape[0]] * self.lora.scale
        scaled = scaled.to(self.head.compute_dtype)
        accumulate = self.head.passes.multiply_accumulate
        if d_hidden is not None:
            accumulate(d_hidden, scaled, self.lora.a.to(self.head.compute_dtype), scratch)
        if self.a is not None:
            accumulate(self.a, scaled.t(), hidden, self.wide_scratch)
