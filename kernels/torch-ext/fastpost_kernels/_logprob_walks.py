"""What linear_logprob's ops do between argument checks and results: a fold forward, and a backward.

Shared by every op that turns hidden states and a head into log-probs of targets, so that all of
them have one arithmetic. The strategy is told in `linear_logprob.py`.
Legend: M rows, m a chunk of scored rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._vocab_gradients import gradient_coefs, recompute_gradients
from ._vocab_passes import BLOCK_ELEMENTS
from ._vocab_tiles import (
    Head,
    ScoredRows,
    WeightTiles,
    combine_target,
    finish_state,
    fold_rows,
    gemm_rows,
    scatter_rows,
    start_state,
    target_logits,
)
from ._vocab_workspace import fold_plan

__all__ = ["backward", "forward", "scale_rows"]

MOMENTS = ("entropy", "log_sum_sq_probs", "mean_logits")


def forward(head: Head, outputs: Sequence[str], with_jacobian: bool) -> dict[str, Tensor]:
    """Statistics by name, `stats` [4, M] for the backward, `jacobian` [M, H] = d logprob / d h."""
    rows = ScoredRows(head.targets, head.weight.shape[0])
    (vocab, width), total = head.weight.shape, rows.total
    moments = any(name in MOMENTS for name in outputs)
    chunk, cols = fold_plan(
        rows.count, vocab, width, head.compute_dtype, with_jacobian, head.budget
    )
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
    tiles, buffer = WeightTiles(head, cols), head.empty(chunk, cols)
    for start, end in rows.chunks(chunk):
        hidden = gemm_rows(head, rows.take(head.hidden, start, end))
        targets = rows.take(head.targets, start, end).contiguous()
        target = target_logits(head, hidden, targets)
        state = start_state(head, target)
        acc = head.stats(end - start, width) if with_jacobian else None
        fold_rows(
            head,
            hidden,
            targets,
            tiles,
            buffer,
            state,
            moments=moments,
            top1="is_top1" in outputs,
            acc=acc,
        )
        found = finish_state(state, target, vocab)
        for name in ("logprob", *outputs):
            rows.put(results[name], start, end, getattr(found, name))
        for i, value in enumerate((found.logprob, found.logsumexp, found.entropy, target.slope)):
            rows.put(results["stats"][i], start, end, value)
        if acc is not None:
            # d logprob / d h = (1 - p_t) z'_t W_t - sum_{v != t} p_v z'_v W_v
            factor = -torch.expm1(found.logprob) * target.slope
            combine_target(target.weight, factor, acc, -head.transform.chain / found.normalizer)
            rows.put(results["jacobian"], start, end, acc)
    return results


def backward(
    head: Head,
    stats: Tensor,  # [4, M]
    jacobian: Tensor | None,  # [M, H]
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d hidden, d weight, d bias from the gradients of logprob, entropy and logsumexp, each [M]."""
    grad_logprob, grad_entropy, grad_logsumexp = grads
    if jacobian is not None and grad_entropy is None and grad_logsumexp is None:
        assert grad_logprob is not None and needs == (True, False, False)
        return scale_rows(jacobian, grad_logprob), None, None
    rows = ScoredRows(head.targets, head.weight.shape[0])
    picked = [None if g is None else rows.take(g, 0, rows.count) for g in grads]
    scored_stats = stats if rows.index is None else stats[:, rows.index]
    coefs = gradient_coefs(scored_stats, head.transform, *picked)
    found = recompute_gradients(head, rows, coefs, needs)
    return (
        None if found.hidden is None else scatter_rows(rows, found.hidden, head.hidden.dtype),
        found.weight,
        None if found.bias is None or head.bias is None else found.bias.to(head.bias.dtype),
    )


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
