"""What linear_logprob's ops do between argument checks and results: a fold forward, and a backward.

Shared by every op that turns hidden states and a head into log-probs of targets, so that all of
them have one arithmetic. The strategy is told in `linear_logprob.py`; `forward_pair` is for
`preference_logratio.py`, whose two sides may have one head.
Legend: M rows, m a chunk of scored rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from ._vocab_gradients import HeadGradients, gradient_coefs, recompute_gradients
from ._vocab_low_rank import combine_frozen, project
from ._vocab_passes import BLOCK_ELEMENTS
from ._vocab_tiles import (
    Head,
    ScoredRows,
    WeightTiles,
    finish_state,
    fold_rows,
    gemm_rows,
    start_state,
    statistics_dtype,
    target_logits,
)
from ._vocab_workspace import fold_plan

__all__ = ["backward", "forward", "forward_pair", "head_gradients", "no_result", "scale_rows"]

MOMENTS = ("entropy", "log_sum_sq_probs", "mean_logits")


def forward(head: Head, outputs: Sequence[str], with_jacobian: bool) -> dict[str, Tensor]:
    """Statistics by name, `stats` [4, M] for the backward, `jacobian` [M, H] = d logprob / d h."""
    rows = ScoredRows(head.targets, head.weight.shape[0])
    (vocab, width), wide = head.weight.shape, head.compute_dtype
    device = head.hidden.device
    chunk, cols = fold_plan(rows.count, vocab, width, wide, with_jacobian, head.budget, device)
    results = _new_results(head, rows, outputs, with_jacobian)
    tiles, buffer = WeightTiles(head, cols), head.empty(chunk, cols)
    for start, end in rows.chunks(chunk):
        fold = _ChunkFold(head, rows, start, end, outputs, with_jacobian)
        fold.add(tiles, buffer)
        fold.finish(results)
    return results


def forward_pair(
    policy: Head, reference: Head, outputs: Sequence[str], with_jacobian: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`forward(policy, outputs, with_jacobian)` and `forward(reference, (), False)` where both have
    one head: each of its tiles is read, and cast where it must be, once for a chunk of both."""
    assert policy.weight is reference.weight and policy.bias is reference.bias
    (vocab, width), wide = policy.weight.shape, policy.compute_dtype
    both = [(policy, outputs, with_jacobian), (reference, (), False)]
    rows = [ScoredRows(head.targets, vocab) for head, _, _ in both]
    count = max(part.count for part in rows)
    device = policy.hidden.device
    chunk, cols = fold_plan(count, vocab, width, wide, with_jacobian, policy.budget, device)
    results = [
        _new_results(head, part, names, keeps)
        for (head, names, keeps), part in zip(both, rows, strict=True)
    ]
    tiles, buffer = WeightTiles(policy, cols), policy.empty(chunk, cols)
    for spans in zip_longest(*(part.chunks(chunk) for part in rows)):
        folds = [
            None if span is None else _ChunkFold(head, part, span[0], span[1], names, keeps)
            for (head, names, keeps), part, span in zip(both, rows, spans, strict=True)
        ]
        for first, last in tiles.spans():
            tile = _HeldTile(tiles, first, last)
            for fold in folds:
                if fold is not None:
                    fold.add(tile, buffer)
        for fold, found in zip(folds, results, strict=True):
            if fold is not None:
                fold.finish(found)
    return results[0], results[1]


class _HeldTile(WeightTiles):
    """One of the tiles of a `WeightTiles`, cast already, for several folds."""

    def __init__(self, tiles: WeightTiles, first: int, last: int) -> None:
        vars(self).update(vars(tiles))
        self.span, self.held = (first, last), tiles.slice(first, last)

    def spans(self) -> Iterator[tuple[int, int]]:
        yield self.span

    def slice(self, first: int, last: int) -> Tensor:
        return self.held


def _new_results(
    head: Head, rows: ScoredRows, outputs: Sequence[str], with_jacobian: bool
) -> dict[str, Tensor]:
    """Results of all rows; those of rows that are not scored stay as they are."""
    total, width = head.hidden.shape
    results = {
        name: head.hidden.new_zeros(
            total, dtype=torch.bool if name == "is_top1" else head.stats_dtype
        )
        for name in ("logprob", *outputs)
    }
    results["stats"] = head.stats(4, total)
    if with_jacobian:
        fill = torch.empty if rows.index is None else torch.zeros
        results["jacobian"] = fill(total, width, dtype=head.hidden.dtype, device=head.hidden.device)
    return results


class _ChunkFold:
    """Scored rows [start, end) on their way over the vocabulary."""

    def __init__(
        self,
        head: Head,
        rows: ScoredRows,
        start: int,
        end: int,
        outputs: Sequence[str],
        with_jacobian: bool,
    ) -> None:
        self.head, self.rows, self.span, self.outputs = head, rows, (start, end), outputs
        self.hidden = gemm_rows(head, rows.take(head.hidden, start, end))
        self.targets = rows.take(head.targets, start, end).contiguous()
        self.low_rank = project(head, self.hidden, with_acc=with_jacobian)
        self.target = target_logits(head, self.hidden, self.targets, self.low_rank)
        self.state = start_state(head, self.target)
        self.acc = head.stats(end - start, head.weight.shape[1]) if with_jacobian else None

    def add(self, tiles: WeightTiles, buffer: Tensor) -> None:
        """Fold `tiles` in; `buffer` holds one tile of logits at a time."""
        fold_rows(
            self.head,
            self.hidden,
            self.targets,
            tiles,
            buffer,
            self.state,
            moments=any(name in MOMENTS for name in self.outputs),
            top1="is_top1" in self.outputs,
            acc=self.acc,
            low_rank=self.low_rank,
        )

    def finish(self, results: dict[str, Tensor]) -> None:
        """Write what the fold found to its rows of `results`."""
        head, rows, target, (start, end) = self.head, self.rows, self.target, self.span
        found = finish_state(self.state, target, head.weight.shape[0])
        for name in ("logprob", *self.outputs):
            rows.put(results[name], start, end, getattr(found, name))
        for i, value in enumerate((found.logprob, found.logsumexp, found.entropy, target.slope)):
            rows.put(results["stats"][i], start, end, value)
        if self.acc is not None:
            # d logprob / d h = (1 - p_t) z'_t W_t - sum_{v != t} p_v z'_v W_v
            factor = -torch.expm1(found.logprob) * target.slope
            shrink = -head.transform.chain / found.normalizer
            combine_frozen(head, target, self.low_rank, factor, self.acc, shrink)
            rows.put(results["jacobian"], start, end, self.acc)


def backward(
    head: Head,
    stats: Tensor,  # [4, M]
    jacobian: Tensor | None,  # [M, H]
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d hidden, d weight, d bias from the gradients of logprob, entropy and logsumexp, each [M]."""
    found = head_gradients(head, stats, jacobian, grads, needs)
    return found.hidden, found.weight, found.bias


def head_gradients(
    head: Head,
    stats: Tensor,  # [4, M]
    jacobian: Tensor | None,  # [M, H]
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
    lora_needs: tuple[bool, bool] = (False, False),
) -> HeadGradients:
    """`backward` with those of an adapter's A and B."""
    grad_logprob, grad_entropy, grad_logsumexp = grads
    if jacobian is not None and grad_entropy is None and grad_logsumexp is None:
        assert grad_logprob is not None and (*needs, *lora_needs) == (True, *[False] * 4)
        return HeadGradients(scale_rows(jacobian, grad_logprob))
    rows = ScoredRows(head.targets, head.weight.shape[0])
    picked = [None if g is None else rows.take(g, 0, rows.count) for g in grads]
    scored_stats = stats if rows.index is None else stats[:, rows.index]
    coefs = gradient_coefs(scored_stats, head.transform, *picked)
    return recompute_gradients(head, rows, coefs, needs, lora_needs).finished(rows)


def scale_rows(matrix: Tensor, factors: Tensor) -> Tensor:
    """factors[:, None] * matrix in the factors' dtype, rounded once to the matrix's."""
    out = torch.empty_like(matrix)
    step = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    if matrix.device.type == "cuda":  # one launch: the GPU casts on the fly, without temporaries
        step = max(1, matrix.shape[0])
    for start in range(0, matrix.shape[0], step):
        part = slice(start, start + step)
        torch.mul(matrix[part], factors[part, None], out=out[part])
    return out


def no_result(hidden: Tensor, name: str, compute_dtype: torch.dtype) -> Tensor:
    """What an op returns for a result that was not asked for: no elements, of its dtype."""
    dtypes = {"is_top1": torch.bool, "jacobian": hidden.dtype}
    return hidden.new_empty(0, dtype=dtypes.get(name, statistics_dtype(compute_dtype)))
