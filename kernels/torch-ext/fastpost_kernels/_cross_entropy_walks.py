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
from ._vocab_gradients import TileGradients, gradient_coefs, recompute_gradients
from ._vocab_tiles import (
    TILE_COLS,
    Head,
    RowStatistics,
    ScoredRows,
    WeightTiles,
    combine_target,
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

__all__ = ["Objective", "forward", "plan"]


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
    rows: int, vocab: int, itemsize: int, smoothing: float, needs: tuple[bool, ...], budget: int
) -> str:
    """Which of the strategies runs: "fold", "frozen", "resident" or "recompute"."""
    if not any(needs):
        return "fold"
    if needs == (True, False, False) and smoothing == 0:
        return "frozen"
    return "resident" if resident_size(rows, vocab) * itemsize <= budget else "recompute"


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
    chunk, cols = fold_plan(rows.count, vocab, width, head.compute_dtype, frozen, head.budget)
    tiles, buffer = WeightTiles(head, cols), head.empty(chunk, cols)
    d_hidden = head.hidden.new_empty(rows.count, width) if frozen else None
    found: list[RowStatistics] = []
    slopes = []
    for start, end in rows.chunks(chunk):
        hidden = gemm_rows(head, rows.take(head.hidden, start, end))
        targets = rows.take(head.targets, start, end).contiguous()
        target = target_logits(head, hidden, targets)
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
        )
        one = finish_state(state, target, vocab)
        if acc is not None and d_hidden is not None:
            # scale (p_v A - [v = t]) z'_v W_v summed over v, with A = 1 + 2 zeta lse
            extra = 2 * objective.z_loss * one.logsumexp
            at_target = torch.expm1(one.logprob) + one.logprob.exp() * extra
            others = (1 + extra) * head.transform.chain / one.normalizer
            scale = objective.scale
            combine_target(target.weight, at_target * target.slope * scale, acc, others * scale)
            d_hidden[start:end] = acc
        found.append(one)
        slopes.append(target.slope)
    statistics = RowStatistics(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    return Folded(statistics, torch.cat(slopes), d_hidden)


def _needs_moments(objective: Objective, outputs: Sequence[str]) -> bool:
    return "entropy" in outputs or objective.label_smoothing > 0


def resident_gradients(
    head: Head,
    rows: ScoredRows,
    objective: Objective,
    outputs: Sequence[str],
    needs: tuple[bool, bool, bool],
) -> tuple[RowStatistics, TileGradients]:
    """All logits at once, [m, V] within the budget: folded, then turned into gradients in place."""
    vocab = head.weight.shape[0]
    tiles = WeightTiles(head, TILE_COLS)
    hidden = gemm_rows(head, rows.take(head.hidden, 0, rows.count))
    targets = rows.take(head.targets, 0, rows.count).contiguous()
    target = target_logits(head, hidden, targets)
    state = start_state(head, target)
    size = resident_size(rows.count, vocab)
    with kept_buffer(size, head.compute_dtype, hidden.device) as buffer:
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
        )
        found = finish_state(state, target, vocab)
        coefs = objective.coefs(head, found, target.slope)
        grads = TileGradients(head, rows.count, TILE_COLS, rows.count, needs)
        for first, last in tiles.spans():
            tile = resident_tile(buffer, rows.count, first, last)
            bias = tiles.bias_slice(first, last)
            head.passes.gradient(tile, coefs, targets, first, bias, head.transform)
            grads.add(tile, tiles.slice(first, last), hidden, 0, first)
            grads.end_span(first, last)
    return found, grads


class ForwardResult(NamedTuple):
    """[M] statistics and the gradients of the loss; what is not needed is None."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    is_top1: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None


def forward(
    head: Head,
    objective: Objective,
    outputs: Sequence[str],
    needs: tuple[bool, bool, bool],
) -> ForwardResult:
    """Loss, statistics and gradients."""
    rows = ScoredRows(head.targets, head.weight.shape[0])
    if rows.count == 0:
        return _no_rows(head, needs)
    strategy = plan(
        rows.count,
        head.weight.shape[0],
        head.compute_dtype.itemsize,
        objective.label_smoothing,
        needs,
        head.budget,
    )
    d_hidden: Tensor | None = None
    grads: TileGradients | None = None
    if strategy == "resident":
        found, grads = resident_gradients(head, rows, objective, outputs, needs)
    else:
        found, slope, d_hidden = fold_all(head, rows, objective, outputs, strategy == "frozen")
        if strategy == "recompute":
            grads = recompute_gradients(head, rows, objective.coefs(head, found, slope), needs)
    if grads is not None:
        d_hidden = grads.hidden
    return ForwardResult(
        objective.loss(found),
        scatter_rows(rows, found.logprob, head.stats_dtype),
        scatter_rows(rows, found.entropy, head.stats_dtype),
        scatter_rows(rows, found.is_top1, torch.bool),
        None if d_hidden is None else scatter_rows(rows, d_hidden, head.hidden.dtype),
        None if grads is None else grads.weight,
        None
        if grads is None or grads.bias is None or head.bias is None
        else grads.bias.to(head.bias.dtype),
    )


def _no_rows(head: Head, needs: tuple[bool, bool, bool]) -> ForwardResult:
    zeros = [
        torch.zeros_like(x, memory_format=torch.contiguous_format)
        if need and x is not None
        else None
        for need, x in zip(needs, (head.hidden, head.weight, head.bias), strict=True)
    ]
    rows = head.hidden.shape[0]
    top1 = head.hidden.new_zeros(rows, dtype=torch.bool)
    return ForwardResult(head.stats(), head.stats(rows), head.stats(rows), top1, *zeros)
