"""From row statistics to gradients: coefficients, and the vocabulary-outer walk.

Every gradient of a logit has the form slope_v (p_v (a + b z_v) + c), with a term at the target;
`gradient_coefs` turns the gradients of log-prob, entropy and logsumexp into a, b, c per row.
Legend: M rows, m scored rows or a chunk of them, H hidden, V vocabulary, n columns of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._csrc import advise_huge_pages
from ._vocab_passes import COEF_ROWS, CONST, LINEAR, LSE, TARGET, UNIFORM, LogitTransform
from ._vocab_tiles import (
    Head,
    ScoredRows,
    WeightTiles,
    gemm_rows,
    leading_columns,
    tile_shape,
)

__all__ = ["TileGradients", "gradient_coefs", "recompute_gradients"]


def gradient_coefs(
    stats: Tensor,  # [4, m]: logprob, logsumexp, entropy, slope of the target
    transform: LogitTransform,
    grad_logprob: Tensor | None = None,  # [m]
    grad_entropy: Tensor | None = None,  # [m]
    grad_logsumexp: Tensor | None = None,  # [m]
    uniform: Tensor | None = None,  # [m], added to d loss / d z_v of every v
) -> Tensor:
    """The rows of `coefs` [5, m] for given gradients of the three differentiable statistics.

    d logprob / d z_v = [v = y] - p_v;  d lse / d z_v = p_v;  d entropy / d z_v = -p_v (log p_v + E)
    """
    logprob, lse, entropy, target_slope = stats
    coefs = stats.new_zeros(COEF_ROWS, stats.shape[1])
    coefs[LSE] = lse
    at_target = coefs[TARGET]
    if grad_logsumexp is not None:
        coefs[CONST] += grad_logsumexp
    if grad_entropy is not None:
        coefs[CONST] += grad_entropy * (lse - entropy)
        coefs[LINEAR] -= grad_entropy
    if uniform is not None:
        coefs[UNIFORM] += uniform
    z = logprob + lse
    at_target += logprob.exp() * (coefs[CONST] + coefs[LINEAR] * z) + coefs[UNIFORM]
    if grad_logprob is not None:
        coefs[CONST] -= grad_logprob
        at_target -= grad_logprob * torch.expm1(logprob)
    at_target *= target_slope
    return coefs


class TileGradients:
    """Collects d hidden, d weight and d bias from gradient tiles, vocabulary outer.

    d hidden is summed over tiles in the statistics' dtype. A slice of d weight is finished within
    its vocabulary span: written by the GEMM itself if all rows are in one chunk, otherwise summed
    over row chunks in a [n, H] accumulator; a full-precision [V, H] buffer never exists.
    """

    def __init__(
        self, head: Head, rows: int, cols: int, chunk: int, needs: tuple[bool, bool, bool]
    ) -> None:
        self.head = head
        need_hidden, need_weight, need_bias = needs
        vocab, width = head.weight.shape
        self.hidden = head.stats(rows, width) if need_hidden else None
        self.weight = None
        if need_weight:
            self.weight = advise_huge_pages(head.weight.new_empty(head.weight.shape))
            if rows == 0:
                self.weight.zero_()
        self.bias = head.stats(vocab) if need_bias else None
        self.one_chunk = rows <= chunk
        self.direct = self.one_chunk and head.weight.dtype == head.compute_dtype
        self.span: Tensor | None = None
        if need_weight and not self.direct:
            self.span = head.stats(cols, width)
        self.scratch = None
        if head.needs_scratch:
            scratch_rows = max(chunk if need_hidden else 0, 0 if self.span is None else cols)
            self.scratch = head.empty(scratch_rows, width)

    def add(self, tile: Tensor, weight: Tensor, hidden: Tensor, row: int, first: int) -> None:
        """`tile` [m, n]: gradients of rows [row, row + m) and columns [first, first + n)."""
        rows, cols = tile.shape
        accumulate = self.head.passes.multiply_accumulate
        if self.hidden is not None:
            scratch = None if self.scratch is None else self.scratch[:rows]
            accumulate(self.hidden[row : row + rows], tile, weight, scratch)
        if self.weight is not None and self.direct:
            torch.mm(tile.t(), hidden, out=self.weight[first : first + cols])
        elif self.span is not None:
            scratch = None if self.scratch is None else self.scratch[:cols]
            accumulate(self.span[:cols], tile.t(), hidden, scratch)
        if self.bias is not None:
            self.bias[first : first + cols] += tile.sum(0, dtype=self.bias.dtype)

    def end_span(self, first: int, last: int) -> None:
        """All rows of columns [first, last) were added."""
        if self.weight is not None and self.span is not None:
            self.weight[first:last] = self.span[: last - first]
            self.span.zero_()


def recompute_gradients(
    head: Head,
    rows: ScoredRows,
    coefs: Tensor,  # [5, m]
    needs: tuple[bool, bool, bool],
) -> TileGradients:
    """Logit tiles once more, turned into gradients: 1 GEMM plus 1 each for d hidden, d weight."""
    vocab = head.weight.shape[0]
    itemsize = head.compute_dtype.itemsize
    chunk, cols = tile_shape(rows.count, vocab, 0, itemsize, head.budget)
    tiles = WeightTiles(head, cols)
    grads = TileGradients(head, rows.count, cols, chunk, needs)
    buffer = head.empty(chunk, cols)
    one_hidden = None
    for first, last in tiles.spans():
        weight, bias = tiles.slice(first, last), tiles.bias_slice(first, last)
        for start, end in rows.chunks(chunk):
            if one_hidden is None or not grads.one_chunk:
                one_hidden = gemm_rows(head, rows.take(head.hidden, start, end))
            targets = rows.take(head.targets, start, end).contiguous()
            tile = leading_columns(buffer[: end - start], last - first)
            torch.mm(one_hidden, weight.t(), out=tile)
            head.passes.gradient(tile, coefs[:, start:end], targets, first, bias, head.transform)
            grads.add(tile, weight, one_hidden, start, first)
        grads.end_span(first, last)
    return grads
