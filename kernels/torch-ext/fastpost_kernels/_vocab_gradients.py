"""From row statistics to gradients: coefficients, and the vocabulary-outer walk.

Every gradient of a logit has the form slope_v (p_v (a + b z_v) + c), with a term at the target;
`gradient_coefs` turns the gradients of log-prob, entropy and logsumexp into a, b, c per row.
Legend: M rows, m scored rows or a chunk of them, H hidden, V vocabulary, n columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._csrc import advise_huge_pages
from ._transposed_product import transposed_product
from ._vocab_filter import column_factors, significant_columns
from ._vocab_low_rank import LowRankGradients, project_all
from ._vocab_passes import COEF_ROWS, CONST, LINEAR, LSE, TARGET, UNIFORM, LogitTransform
from ._vocab_tiles import (
    Head,
    ScoredRows,
    WeightTiles,
    gemm_rows,
    leading_columns,
    multiply_logits,
    scatter_rows,
)
from ._vocab_workspace import recompute_plan

__all__ = [
    "HeadGradients",
    "TileGradients",
    "fake_results",
    "gradient_coefs",
    "recompute_gradients",
]


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


class HeadGradients(NamedTuple):
    """Shaped and typed like what they are gradients of; what is not needed is None."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    def as_results(self, arguments: HeadGradients) -> FiveTensors:
        """What an op returns: tensors without elements in place of None."""
        return _five(arguments, lambda i, like: like.new_empty(0) if self[i] is None else self[i])


FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def fake_results(arguments: HeadGradients, needs: Sequence[bool]) -> FiveTensors:
    """Shapes and dtypes of `as_results`, for fake tensors."""

    def make(i: int, like: Tensor) -> Tensor:
        return like.new_empty(like.shape if needs[i] and arguments[i] is not None else 0)

    return _five(arguments, make)


def _five(arguments: HeadGradients, make: Callable[[int, Tensor], Tensor | None]) -> FiveTensors:
    """`make(i, argument i)` of each; a missing argument is typed like the weight."""
    assert arguments.weight is not None
    found = [make(i, arguments.weight if x is None else x) for i, x in enumerate(arguments)]
    hidden, weight, bias, lora_a, lora_b = (x for x in found if x is not None)
    return hidden, weight, bias, lora_a, lora_b


class TileGradients:
    """Collects the gradients of hidden, weight, bias and an adapter from gradient tiles.

    d hidden is summed over tiles in the statistics' dtype. A slice of d weight is finished within
    its vocabulary span: written by the GEMM itself if all rows are in one chunk, otherwise summed
    over row chunks in a [n, H] accumulator; a full-precision [V, H] buffer never exists. Columns
    without a significant gradient are left out of the GEMMs if `head.filter_eps` asks for it.
    """

    def __init__(
        self,
        head: Head,
        rows: int,
        cols: int,
        chunk: int,
        needs: tuple[bool, bool, bool],
        lora_needs: tuple[bool, bool] = (False, False),
    ) -> None:
        """For `rows` rows in chunks of `chunk`, tiles of at most `cols` columns."""
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
        self.low_rank = None
        if head.lora is not None and (need_hidden or any(lora_needs)):
            longest = max(chunk, cols)
            self.low_rank = LowRankGradients(head, rows, longest, *lora_needs, need_hidden)
        self.one_chunk = rows <= chunk
        self.direct = self.one_chunk and head.weight.dtype == head.compute_dtype
        self.span: Tensor | None = None
        if need_weight and not self.direct:
            self.span = head.stats(cols, width)
        self.scratch = None
        if head.needs_scratch:
            scratch_rows = max(chunk if need_hidden else 0, 0 if self.span is None else cols)
            self.scratch = head.empty(scratch_rows, width)

    def add(
        self,
        tile: Tensor,  # [m, n] gradients
        weight: Tensor,  # [n, H]
        hidden: Tensor,  # [m, H]
        row: int,
        first: int,
        column_factors: Tensor | None = None,  # [m], see `_vocab_filter.py`
        factor: Tensor | None = None,  # [m, r]
        lora_b: Tensor | None = None,  # [n, r]
    ) -> None:
        """`tile` is of rows [row, row + m) and columns [first, first + n)."""
        rows, cols = tile.shape
        if self.bias is not None:
            self.bias[first : first + cols] += tile.sum(0, dtype=self.bias.dtype)
        columns = None
        if column_factors is not None:
            columns = significant_columns(self.head, tile, column_factors)
        if columns is not None:
            tile, weight = tile.index_select(1, columns), weight.index_select(0, columns)
        if self.hidden is not None:
            scratch = None if self.scratch is None else self.scratch[:rows]
            accumulate = self.head.passes.multiply_accumulate
            accumulate(self.hidden[row : row + rows], tile, weight, scratch)
        if self.weight is not None:
            self._add_weight(tile, hidden, first, cols, columns)
        if self.low_rank is not None and factor is not None and lora_b is not None:
            if columns is not None:
                lora_b = lora_b.index_select(0, columns)
            self.low_rank.add(tile, lora_b, factor, row, first, columns)

    def _add_weight(
        self, tile: Tensor, hidden: Tensor, first: int, cols: int, columns: Tensor | None
    ) -> None:
        """tile^T hidden, to `columns` of the span of `cols` columns that begins at `first`."""
        accumulate = self.head.passes.multiply_accumulate
        kept = tile.shape[1]
        scratch = None if self.scratch is None or self.direct else self.scratch[:kept]
        if self.direct and self.weight is not None:
            part = self.weight[first : first + cols]
            if columns is None:
                transposed_product(tile, hidden, part)
            else:
                part.zero_().index_copy_(0, columns, torch.mm(tile.t(), hidden))
        elif self.span is not None and columns is None:
            accumulate(self.span[:cols], tile.t(), hidden, scratch)
        elif self.span is not None and columns is not None:
            product = self.head.stats(kept, hidden.shape[1])
            accumulate(product, tile.t(), hidden, scratch)
            self.span.index_add_(0, columns, product)

    def end_span(self, first: int, last: int) -> None:
        """All rows of columns [first, last) were added."""
        if self.weight is not None and self.span is not None:
            self.weight[first:last] = self.span[: last - first]
            self.span.zero_()

    def end_rows(self, hidden: Tensor, row: int) -> None:
        """All columns of the rows of `hidden` [m, H], the first of which is `row`, were added."""
        if self.low_rank is not None:
            rows = hidden.shape[0]
            d_hidden = None if self.hidden is None else self.hidden[row : row + rows]
            scratch = None if self.scratch is None else self.scratch[:rows]
            self.low_rank.end_rows(hidden, row, d_hidden, scratch)

    def finished(self, rows: ScoredRows) -> HeadGradients:
        """The sums as gradients of the arguments: rows that are not scored get zeros."""
        head, low_rank = self.head, self.low_rank
        bias = None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype)
        lora_a = lora_b = None
        if low_rank is not None and head.lora is not None:
            lora_a = None if low_rank.a is None else low_rank.a.to(head.lora.a.dtype)
            lora_b = None if low_rank.b is None else low_rank.b.to(head.lora.b.dtype)
        hidden = self.hidden
        if hidden is not None:
            hidden = scatter_rows(rows, hidden, head.hidden.dtype)
        return HeadGradients(hidden, self.weight, bias, lora_a, lora_b)


def recompute_gradients(
    head: Head,
    rows: ScoredRows,
    coefs: Tensor,  # [5, m]
    needs: tuple[bool, bool, bool],
    lora_needs: tuple[bool, bool] = (False, False),
) -> TileGradients:
    """Logit tiles once more, turned into gradients: 1 GEMM plus 1 each for d hidden, d weight."""
    vocab = head.weight.shape[0]
    chunk, cols = recompute_plan(
        rows.count, vocab, head.compute_dtype.itemsize, head.filter_eps is not None, head.budget
    )
    tiles = WeightTiles(head, cols)
    grads = TileGradients(head, rows.count, cols, chunk, needs, lora_needs)
    factors, low_rank = column_factors(head, coefs), project_all(head, rows, chunk)
    buffer = head.empty(chunk, cols)
    one_hidden = None
    for first, last in tiles.spans():
        weight, bias = tiles.slice(first, last), tiles.bias_slice(first, last)
        lora_b = tiles.lora_b_slice(first, last)
        for start, end in rows.chunks(chunk):
            if one_hidden is None or not grads.one_chunk:
                one_hidden = gemm_rows(head, rows.take(head.hidden, start, end))
            targets = rows.take(head.targets, start, end).contiguous()
            tile = leading_columns(buffer[: end - start], last - first)
            factor = None if low_rank is None else low_rank[start:end]
            multiply_logits(one_hidden, weight, tile, factor, lora_b)
            head.passes.gradient(tile, coefs[:, start:end], targets, first, bias, head.transform)
            peaks = None if factors is None else factors[start:end]
            grads.add(tile, weight, one_hidden, start, first, peaks, factor, lora_b)
        grads.end_span(first, last)
    if grads.low_rank is not None:
        for start, end in rows.chunks(chunk):
            grads.end_rows(gemm_rows(head, rows.take(head.hidden, start, end)), start)
    return grads
