"""The walks of linear_cross_entropy: one per strategy, chosen by `plan`.

The coefficients of the loss are known before the backward, so every walk returns finished gradients
of the scaled sum; see `linear_cross_entropy.py` for the equations and for when which walk runs.
Legend: M rows, m scored rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._kept_buffer import kept_buffer
from ._vocab_filter import column_factors
from ._vocab_gradients import (
    HeadGradients,
    TileGradients,
    gradient_coefs,
    recompute_gradients,
)
from ._vocab_low_rank import combine_frozen, project
from ._vocab_tiles import (
    TILE_COLS,
    Head,
    RowStatistics,
    ScoredRows,
    WeightTiles,
    finish_state,
    fold_rows,
    gemm_rows,
    resident_size,
    resident_tile,
    scatter_rows,
    start_state,
    target_logits,
)
from ._vocab_workspace import fold_plan

__all__ = ["Objective", "forward", "plan", "resident_rows"]

# A GEMM of fewer rows is bound by reading the head: recomputing tiles of more rows is cheaper.
MIN_RESIDENT_ROWS = 512


class Objective(NamedTuple):
    """What is summed over rows, and the factor of the sum (a scalar tensor)."""

    label_smoothing: float
    z_loss: float
    scale: Tensor

    def loss(self, found: RowStatistics) -> Tensor:
        rows = (self.label_smoothing - 1) * found.logprob
        if self.label_smoothing:
            rows = rows + self.label_smoothing * (found.logsumexp - found.mean_logits)
        if self.z_loss:
            rows = rows + self.z_loss * found.logsumexp.square()
        return rows.sum() * self.scale

    def coefs(self, head: Head, found: RowStatistics, slope: Tensor) -> Tensor:
        stats = torch.stack([found.logprob, found.logsumexp, found.entropy, slope])
        ones = torch.ones_like(found.logprob) * self.scale
        return gradient_coefs(
            stats,
            head.transform,
            grad_logprob=(self.label_smoothing - 1) * ones,
            grad_logsumexp=(self.label_smoothing + 2 * self.z_loss * found.logsumexp) * ones,
            uniform=-self.label_smoothing / head.weight.shape[0] * ones,
        )


def plan(
    rows: int,
    vocab: int,
    itemsize: int,
    smoothing: float,
    needs: tuple[bool, ...],  # hidden, weight, bias, and an adapter's A and B
    budget: int,
    filtered: bool = False,
) -> str:
    """Which of the strategies runs: "fold", "frozen", "resident" or "recompute"."""
    if not any(needs):
        return "fold"
    chunk = resident_rows(rows, vocab, itemsize, needs[1], budget)
    if not any(needs[1:]) and smoothing == 0 and not (filtered and chunk):
        return "frozen"
    return "resident" if chunk or not rows else "recompute"


def resident_rows(rows: int, vocab: int, itemsize: int, need_weight: bool, budget: int) -> int:
    """Rows whose logits are kept at once, 0 if none are.

    A slice of d weight is written once, by one GEMM over all rows: they fit together or not at all.
    Without d weight nothing of the head's size is summed over chunks of rows.
    """
    fitting = budget // (resident_size(1, vocab) * itemsize)
    if fitting >= rows or (fitting >= MIN_RESIDENT_ROWS and not need_weight):
        chunks = max(1, -(-rows // max(1, fitting)))
        return -(-rows // chunks)
    return 0


class Folded(NamedTuple):
    """Every scored row's statistics, and the frozen head's d hidden."""

    statistics: RowStatistics
    slope: Tensor  # [m]
    d_hidden: Tensor | None  # [m, H]


def fold_all(
    head: Head, rows: ScoredRows, objective: Objective, outputs: Sequence[str], frozen: bool
) -> Folded:
    """Statistics by chunks of rows; with `frozen` also d loss / d h, from the same walk."""
    vocab, width = head.weight.shape
    device, dtype = head.hidden.device, head.compute_dtype
    chunk, cols = fold_plan(rows.count, vocab, width, dtype, frozen, head.budget, device)
    tiles, buffer = WeightTiles(head, cols), head.empty(chunk, cols)
    d_hidden = head.hidden.new_empty(rows.count, width) if frozen else None
    found: list[RowStatistics] = []
    slopes = []
    for start, end in rows.chunks(chunk):
        hidden = gemm_rows(head, rows.take(head.hidden, start, end))
        targets = rows.take(head.targets, start, end).contiguous()
        low_rank = project(head, hidden, with_acc=frozen)
        target = target_logits(head, hidden, targets, low_rank)
        state = start_state(head, target)
        acc = head.stats(end - start, width) if frozen else None
        fold_rows(
            head,
            hidden,
            targets,
            tiles,
            buffer,
            state,
            moments=_needs_moments(objective, outputs),
            top1="is_top1" in outputs,
            acc=acc,
            low_rank=low_rank,
        )
        one = finish_state(state, target, vocab)
        if acc is not None and d_hidden is not None:
            # scale (p_v A - [v = t]) z'_v W_v summed over v, with A = 1 + 2 zeta lse
            extra = 2 * objective.z_loss * one.logsumexp
            at_target = torch.expm1(one.logprob) + one.logprob.exp() * extra
            others = (1 + extra) * head.transform.chain / one.normalizer
            at_target, others = at_target * target.slope * objective.scale, others * objective.scale
            combine_frozen(head, target, low_rank, at_target, acc, others)
            d_hidden[start:end] = acc
        found.append(one)
        slopes.append(target.slope)
    return Folded(_join(found), torch.cat(slopes), d_hidden)


def _needs_moments(objective: Objective, outputs: Sequence[str]) -> bool:
    return "entropy" in outputs or objective.label_smoothing > 0


def resident_gradients(
    head: Head,
    rows: ScoredRows,
    objective: Objective,
    outputs: Sequence[str],
    needs: tuple[bool, bool, bool],
    lora_needs: tuple[bool, bool],
) -> tuple[RowStatistics, TileGradients]:
    """A chunk's logits at once, [m, V] within the budget: folded, then turned into gradients in
    place."""
    vocab, itemsize = head.weight.shape[0], head.compute_dtype.itemsize
    chunk = resident_rows(rows.count, vocab, itemsize, needs[1], head.budget)
    tiles = WeightTiles(head, TILE_COLS)
    grads = TileGradients(head, rows.count, TILE_COLS, chunk, needs, lora_needs)
    parts: list[RowStatistics] = []
    size = resident_size(chunk, vocab)
    with kept_buffer(size, head.compute_dtype, head.hidden.device) as buffer:
        for start, end in rows.chunks(chunk):
            hidden = gemm_rows(head, rows.take(head.hidden, start, end))
            targets = rows.take(head.targets, start, end).contiguous()
            low_rank = project(head, hidden)
            target = target_logits(head, hidden, targets, low_rank)
            state = start_state(head, target)
            fold_rows(
                head,
                hidden,
                targets,
                tiles,
                buffer,
                state,
                moments=_needs_moments(objective, outputs),
                top1="is_top1" in outputs,
                resident=True,
                low_rank=low_rank,
            )
            found = finish_state(state, target, vocab)
            coefs = objective.coefs(head, found, target.slope)
            factors = column_factors(head, coefs)
            factor = None if low_rank is None else low_rank.factor
            for first, last in tiles.spans():
                tile = resident_tile(buffer, end - start, first, last)
                bias, lora_b = tiles.bias_slice(first, last), tiles.lora_b_slice(first, last)
                head.passes.gradient(tile, coefs, targets, first, bias, head.transform)
                weight = tiles.slice(first, last)
                grads.add(tile, weight, hidden, start, first, factors, factor, lora_b)
                grads.end_span(first, last)
            grads.end_rows(hidden, start)
            parts.append(found)
    return _join(parts), grads


def _join(parts: list[RowStatistics]) -> RowStatistics:
    return RowStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


class ForwardResult(NamedTuple):
    """[M] statistics and the gradients of the loss."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    is_top1: Tensor
    gradients: HeadGradients


def forward(
    head: Head,
    objective: Objective,
    outputs: Sequence[str],
    needs: tuple[bool, bool, bool],
    lora_needs: tuple[bool, bool] = (False, False),
) -> ForwardResult:
    """Loss, statistics and gradients."""
    rows = ScoredRows(head.targets, head.weight.shape[0])
    if rows.count == 0:
        return _no_rows(head, (*needs, *lora_needs))
    strategy = plan(
        rows.count,
        head.weight.shape[0],
        head.compute_dtype.itemsize,
        objective.label_smoothing,
        (*needs, *lora_needs),
        head.budget,
        head.filter_eps is not None,
    )
    if strategy == "resident":
        found, sums = resident_gradients(head, rows, objective, outputs, needs, lora_needs)
        gradients = sums.finished(rows)
    else:
        found, slope, d_hidden = fold_all(head, rows, objective, outputs, strategy == "frozen")
        gradients = HeadGradients()
        if d_hidden is not None:
            gradients = HeadGradients(scatter_rows(rows, d_hidden, head.hidden.dtype))
        if strategy == "recompute":
            coefs = objective.coefs(head, found, slope)
            gradients = recompute_gradients(head, rows, coefs, needs, lora_needs).finished(rows)
    return ForwardResult(
        objective.loss(found),
        scatter_rows(rows, found.logprob, head.stats_dtype),
        scatter_rows(rows, found.entropy, head.stats_dtype),
        scatter_rows(rows, found.is_top1, torch.bool),
        gradients,
    )


def _no_rows(head: Head, needs: tuple[bool, ...]) -> ForwardResult:
    lora_a, lora_b = (None, None) if head.lora is None else (head.lora.a, head.lora.b)
    parameters = (head.hidden, head.weight, head.bias, lora_a, lora_b)
    zeros = [
        torch.zeros_like(x, memory_format=torch.contiguous_format)
        if need and x is not None
        else None
        for need, x in zip(needs, parameters, strict=True)
    ]
    rows = head.hidden.shape[0]
    top1 = head.hidden.new_zeros(rows, dtype=torch.bool)
    return ForwardResult(
        head.stats(), head.stats(rows), head.stats(rows), top1, HeadGradients(*zeros)
    )
