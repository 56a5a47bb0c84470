"""linear_logprob's walks where each rank of a group holds a part of the vocabulary.

Between a rank's fold and its results stand three reductions over the group, of O(m) numbers for a
chunk of m rows; the arithmetic is that of one process:

    target's z and slope   sum   they live on one rank and are every rank's first reference
    REF and the TOP rows   max   then each rank's sums are brought to the common reference
    the sums               sum

A frozen head's accumulator [m, H] is scaled by the common normaliser and summed once; the backward
is then a row scaling without communication. A recomputed backward sums d hidden once.
Legend: M rows, m a chunk of scored rows, H hidden, V vocabulary, Vr this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._logprob_walks import MOMENTS, scale_rows
from ._vocab_agreement import Group
from ._vocab_gradients import gradient_coefs, recompute_gradients
from ._vocab_passes import (
    REF,
    SQUARES,
    SUM,
    TOP_AFTER,
    TOP_SELF,
    XSUM,
    ZSUM,
)
from ._vocab_tiles import (
    Head,
    ScoredRows,
    TargetLogits,
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

__all__ = ["Part", "backward", "forward"]


class Part(NamedTuple):
    """Where a rank's rows of the head lie: [start, start + Vr) of `vocab`."""

    start: int
    vocab: int
    group: Group


def forward(
    head: Head,  # weight and bias are this rank's, targets those of the whole vocabulary
    part: Part,
    outputs: Sequence[str],
    with_jacobian: bool,
) -> dict[str, Tensor]:
    """As `_logprob_walks.forward`; equal on all ranks."""
    rows = ScoredRows(head.targets, part.vocab)
    width, total = head.weight.shape[1], rows.total
    moments, top1 = any(name in MOMENTS for name in outputs), "is_top1" in outputs
    # planned for the whole vocabulary, so that ranks with unequal parts cut the same chunks
    chunk, cols = fold_plan(
        rows.count, part.vocab, width, head.compute_dtype, with_jacobian, head.budget
    )
    results = {
        name: head.hidden.new_zeros(
            total, dtype=torch.bool if name == "is_top1" else head.stats_dtype
        )
        for name in ("logprob", *outputs)
    }
    results["stats"] = head.stats(4, total)
    if with_jacobian:
        results["jacobian"] = head.hidden.new_zeros(total, width)
    tiles, buffer = WeightTiles(head, cols), head.empty(chunk, cols)
    for start, end in rows.chunks(chunk):
        hidden = gemm_rows(head, rows.take(head.hidden, start, end))
        targets = rows.take(head.targets, start, end) - part.start
        target, is_here = shared_target(head, hidden, targets, part.group)
        state = start_state(head, target)
        acc = head.stats(end - start, width) if with_jacobian else None
        fold_rows(head, hidden, targets, tiles, buffer, state, moments=moments, top1=top1, acc=acc)
        rescale = merge_states(state, part.group, moments=moments, top1=top1)
        found = finish_state(state, target, part.vocab)
        for name in ("logprob", *outputs):
            rows.put(results[name], start, end, getattr(found, name))
        for i, value in enumerate((found.logprob, found.logsumexp, found.entropy, target.slope)):
            rows.put(results["stats"][i], start, end, value)
        if acc is not None:
            factor = -head.transform.chain / found.normalizer * rescale
            at_target = -torch.expm1(found.logprob) * target.slope
            combine_target(target.weight, at_target.where(is_here, 0), acc, factor)
            part.group.all_reduce(acc, "sum")
            rows.put(results["jacobian"], start, end, acc)
    return results


def shared_target(
    head: Head,
    hidden: Tensor,  # [m, H]
    targets: Tensor,  # [m], relative to this rank's part
    group: Group,
) -> tuple[TargetLogits, Tensor]:
    """Every row's target as the rank that holds it computed it, and whether this one does, [m].

    `weight` holds any row of the head where it does not.
    """
    held = head.weight.shape[0]
    is_here = (targets >= 0) & (targets < held)
    both = head.stats(2, targets.shape[0])
    weight = torch.zeros_like(hidden)
    if held:
        found = target_logits(head, hidden, targets.clamp(0, held - 1))
        weight = found.weight
        both[0], both[1] = found.z.where(is_here, 0), found.slope.where(is_here, 0)
    z, slope = group.all_reduce(both, "sum")
    return TargetLogits(weight, z, slope), is_here


def merge_states(state: Tensor, group: Group, *, moments: bool, top1: bool) -> Tensor:
    """Make every rank's `state` [9, m] that of the whole vocabulary, in place.

    Returns what this rank's exponentials must be multiplied by, [m].
    """
    ours = state[REF].clone()
    if top1:
        maxima = torch.cat([state[REF : REF + 1], state[TOP_SELF : TOP_AFTER + 1]])
        group.all_reduce(maxima, "max")
        state[REF], state[TOP_SELF : TOP_AFTER + 1] = maxima[0], maxima[1:]
    else:
        group.all_reduce(state[REF], "max")
    moved = torch.where(ours == state[REF], 0.0, ours - state[REF])
    rescale = moved.exp()
    if moments:
        state[XSUM] = (state[XSUM] + moved * state[SUM]) * rescale
        state[SQUARES] *= rescale.square()
    state[SUM] *= rescale
    group.all_reduce(state[SUM : (ZSUM if moments else SUM) + 1], "sum")
    return rescale


def backward(
    head: Head,
    part: Part,
    stats: Tensor,  # [4, M]
    jacobian: Tensor | None,  # [M, H]
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d hidden of the whole head, d weight and d bias of this rank's part of it."""
    grad_logprob, grad_entropy, grad_logsumexp = grads
    if jacobian is not None and grad_entropy is None and grad_logsumexp is None:
        assert grad_logprob is not None and needs == (True, False, False)
        return scale_rows(jacobian, grad_logprob), None, None
    rows = ScoredRows(head.targets, part.vocab)
    picked = [None if g is None else rows.take(g, 0, rows.count) for g in grads]
    scored_stats = stats if rows.index is None else stats[:, rows.index]
    coefs = gradient_coefs(scored_stats, head.transform, *picked)
    if head.weight.shape[0]:
        ours = head._replace(targets=head.targets - part.start)
        found = recompute_gradients(ours, rows, coefs, needs)
        d_hidden, d_weight, d_bias = found.hidden, found.weight, found.bias
    else:
        d_hidden = head.stats(rows.count, head.hidden.shape[1]) if needs[0] else None
        d_weight = torch.empty_like(head.weight) if needs[1] else None
        d_bias = head.stats(0) if needs[2] else None
    if d_hidden is not None:
        part.group.all_reduce(d_hidden, "sum")
        d_hidden = scatter_rows(rows, d_hidden, head.hidden.dtype)
    if d_bias is not None and head.bias is not None:
        d_bias = d_bias.to(head.bias.dtype)
    return d_hidden, d_weight, d_bias
