"""Prefix attention as a few calls of an attention kernel for sequences laid end to end.

One call holds every segment against itself. Then, for every depth of the forest, one call holds the
segments of that depth as keys against the queries below them: within a depth these are disjoint, so
each query is in at most one sequence of a call.

A window cuts an inherited region where paths are longer than it. Such a region falls apart into its
descendant segments. Let the first query of one be g + 1 tokens behind the last of Lk keys, and
V = window − 1 − g; then query i sees the last V − i keys, which is, exactly:

    queries [0, w)   all keys                          w = clamp(V − Lk + 1, 0, n), n = min(Lq, V)
    queries [w, n)   the last V − n keys                                     t = n − w of them
                     of the t keys before those: key j if j ≥ i, a square triangle

The first two are rectangles; the triangles go into a call of their own. Several descendants then
read the same keys, which each sequence needs for itself: a call takes as many sequences as have
N keys together, so that what it gathers stays within what the layer holds anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._flash_varlen import Layout
from ._prefix_segments import PrefixSchedule

__all__ = ["PlacedCall", "VarlenCall", "placed_calls", "varlen_calls"]

_MAX_SEQUENCES = 65_535  # of a call: a dimension of CUDA's grid

Range = tuple[int, int]


class _Sequence(NamedTuple):
    queries: Range
    keys: Range


@dataclass(frozen=True)
class VarlenCall:
    """One call: sequences of tokens [start, end), and how far a query sees (see `Layout`)."""

    sequences: tuple[_Sequence, ...]
    left: int | None
    right: int | None


class PlacedCall(NamedTuple):
    """A call on a device: which tokens to take, and how they are laid out."""

    queries: slice | Tensor  # of tokens, a slice where they are one range
    keys: slice | Tensor
    layout: Layout


@lru_cache(maxsize=16)
def placed_calls(
    schedule: PrefixSchedule, window: int | None, device: torch.device
) -> tuple[PlacedCall, ...]:
    """`varlen_calls` on a device, cached for the layers of a model and its backward."""
    return tuple(_place(call, device) for call in varlen_calls(schedule, window))


def varlen_calls(schedule: PrefixSchedule, window: int | None) -> list[VarlenCall]:
    """All (query, key) pairs of the forest, each once; the first call has every token as query."""
    segments = schedule.segments
    cut = {
        region.key_start
        for region in schedule.inherited
        if window is not None and region.max_distance >= window
    }
    rectangles: list[list[_Sequence]] = []  # by depth of the keys
    triangles: list[list[_Sequence]] = []
    path: list[int] = []
    for index, (start, end, subtree_end) in enumerate(segments):
        while path and segments[path[-1]][2] <= start:
            path.pop()
        for depth, above in enumerate(path):
            key_start, key_end, _ = segments[above]
            if key_start in cut:
                assert window is not None
                distance = schedule.spans[index][0] - sum(schedule.spans[above]) + 1
                _add_windowed(
                    (start, end), (key_start, key_end), window - distance,
                    rectangles[depth], triangles[depth],
                )  # fmt: skip
        if len(path) == len(rectangles):
            rectangles.append([])
            triangles.append([])
        if subtree_end > end and start not in cut:
            rectangles[len(path)].append(_Sequence((end, subtree_end), (start, end)))
        path.append(index)
    own = [_Sequence((start, end), (start, end)) for start, end, _ in segments]
    max_keys = segments[-1][1] if segments else 0
    calls = _split(own, max_keys, None if window is None else window - 1, 0)
    for depth in range(len(rectangles)):
        calls += _split(rectangles[depth], max_keys, None, None)
        calls += _split(triangles[depth], max_keys, 0, None)
    return calls


def _add_windowed(
    queries: Range,
    keys: Range,
    visible: int,
    rectangles: list[_Sequence],
    triangles: list[_Sequence],
) -> None:
    """Adds the pairs where query i sees the last `visible` − i keys."""
    start, key_end = queries[0], keys[1]
    num_rows = min(queries[1] - start, visible)
    if num_rows <= 0:
        return
    num_whole = min(max(visible - (key_end - keys[0]) + 1, 0), num_rows)
    if num_whole:
        rectangles.append(_Sequence((start, start + num_whole), keys))
    side = num_rows - num_whole
    if not side:
        return
    rows = (start + num_whole, start + num_rows)
    corner = key_end - (visible - num_rows)
    if corner < key_end:
        rectangles.append(_Sequence(rows, (corner, key_end)))
    triangles.append(_Sequence(rows, (corner - side, corner)))


def _split(
    sequences: list[_Sequence], max_keys: int, left: int | None, right: int | None
) -> list[VarlenCall]:
    """Calls of at most `max_keys` keys each, in order."""
    calls: list[VarlenCall] = []
    taken: list[_Sequence] = []
    num_keys = 0
    for sequence in sequences:
        length = sequence.keys[1] - sequence.keys[0]
        if taken and (num_keys + length > max_keys or len(taken) == _MAX_SEQUENCES):
            calls.append(VarlenCall(tuple(taken), left, right))
            taken, num_keys = [], 0
        taken.append(sequence)
        num_keys += length
    if taken:
        calls.append(VarlenCall(tuple(taken), left, right))
    return calls


def _place(call: VarlenCall, device: torch.device) -> PlacedCall:
    queries = [sequence.queries for sequence in call.sequences]
    keys = [sequence.keys for sequence in call.sequences]
    layout = Layout(
        _cumulative(queries, device),
        _cumulative(keys, device),
        max(end - start for start, end in queries),
        max(end - start for start, end in keys),
        call.left,
        call.right,
    )
    return PlacedCall(_tokens(queries, device), _tokens(keys, device), layout)


def _cumulative(ranges: list[Range], device: torch.device) -> Tensor:
    lengths = torch.tensor([0, *(end - start for start, end in ranges)])
    return lengths.cumsum(0).to(device, torch.int32)


def _tokens(ranges: list[Range], device: torch.device) -> slice | Tensor:
    if all(before[1] == after[0] for before, after in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(start, end) for start, end in ranges]).to(device)
