"""Turns a padded or already packed batch into a forest of unique tokens.

A decoder's hidden state at a token depends on the tokens before it in the same row and on nothing
else. Two rows that begin with the same ids therefore have the same hidden states there, and the
shared beginning needs to be computed once: the prompt of a preference pair, the prompt of a group
of rollouts, a system prompt common to the batch. Tokens behind the last one whose prediction is
scored influence nothing and are left out.

The result is a forest in depth-first order. Its segments tile the unique tokens; each begins where
its rows part from their neighbours and ends where they part from each other:

    row 0  A A A B B            segments          (start, end, subtree_end)
    row 1  A A A C C C    ->    A A A             (0, 3, 8)
                                    B B           (3, 5, 5)
                                    C C C         (5, 8, 8)

Attention then needs no mask: a segment attends causally to itself, and the contiguous range
`[end, subtree_end)` behind it attends to it in full.

Rows are sorted once by their bytes; the longest common prefix of neighbours gives the forest. Cost:
O(B log B) comparisons of rows plus O(B T) vectorised work, a fraction of a percent of a step.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# A shared prefix shorter than this costs more in extra attention calls than it saves.
MIN_SHARED_TOKENS = 8


class UnpackableBatchError(ValueError):
    """The batch has a layout whose rows are not plain left-to-right sequences."""


class PackPlan:
    """Unique tokens of a batch and the way back to its rows.

    A plain class on purpose: FSDP2 copies dataclasses it finds among module arguments.

    Attributes:
        input_ids: `[N]` int64, unique tokens in depth-first order of the forest.
        position_ids: `[N]` int64, each token's position in its rows.
        segments: `[S, 3]` int64 on the CPU: `(start, end, subtree_end)` per segment.
        token_index: `[B, T]` int64, the unique token at a place of the batch, -1 where none is.
        num_rows: sequences found (documents of a packed row count one each).
        num_padded_tokens: `B * T`, what an unpacked forward would compute.
        num_row_tokens: tokens that are not padding, counted once per row.
        num_unique_tokens: `N`.
    """

    def __init__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        token_index: Tensor,
        num_rows: int,
        num_row_tokens: int,
    ) -> None:
        self.input_ids = input_ids
        self.position_ids = position_ids
        self.segments = segments
        self.token_index = token_index
        self.num_rows = num_rows
        self.num_row_tokens = num_row_tokens
        self.num_padded_tokens = token_index.numel()
        self.num_unique_tokens = input_ids.numel()


def pack(
    input_ids: Tensor,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
    position_ids: Tensor | None = None,  # [B, T]
    *,
    scored: Tensor | None = None,  # [B, T]
    share: bool = True,
) -> PackPlan:
    """Pack a batch into a forest of unique tokens.

    Args:
        input_ids: `[B, T]` integer ids.
        attention_mask: `[B, T]`, non-zero at tokens. Padding may stand on either side.
        position_ids: `[B, T]`. Where they fall back to a lower value inside a row, a new document
            begins: a packed row holds several sequences. Within a sequence they must count up by 1.
        scored: `[B, T]` bool, True where the prediction made *at* this place is scored. Tokens
            behind a sequence's last scored place are left out. None keeps every token.
        share: compute equal beginnings once. False still removes padding.

    Returns:
        The `PackPlan`, on the device of `input_ids` (segments on the CPU).

    Raises:
        ValueError: shapes do not match.
        UnpackableBatchError: a mask with a hole inside a row, positions that jump, or a scored
            place that is padding.
    """
    _check_shapes(input_ids, attention_mask, position_ids, scored)
    batch, width = input_ids.shape
    ids = input_ids.detach().cpu().numpy().astype(np.int64)
    mask = None if attention_mask is None else attention_mask.detach().cpu().numpy() != 0
    positions = None if position_ids is None else position_ids.detach().cpu().numpy()
    flat_scored = None if scored is None else scored.detach().cpu().numpy()

    starts, stops = _find_sequences(batch, width, mask, positions)
    row_tokens = int((stops - starts).sum())
    first_positions = np.zeros_like(starts) if positions is None else positions.reshape(-1)[starts]
    num_rows = len(starts)
    if flat_scored is not None:
        if mask is not None and (flat_scored & ~mask).any():
            row = int(np.argmax((flat_scored & ~mask).any(1)))
            raise UnpackableBatchError(
                f"row {row} scores a prediction made at a padding token; set its label to -100"
            )
        stops = _last_scored(starts, stops, flat_scored.reshape(-1))
    keep = stops > starts
    starts, stops, first_positions = starts[keep], stops[keep], first_positions[keep]

    order, shared = _sort_rows(ids.reshape(-1), starts, stops, first_positions, share)
    forest = _build_forest(order, shared, stops - starts)
    segments, source, token_index = _lay_out(forest, starts, batch * width)

    device = input_ids.device
    flat_positions = _positions(batch * width, starts, stops, first_positions)
    return PackPlan(
        input_ids=torch.from_numpy(ids.reshape(-1)[source]).to(device),
        position_ids=torch.from_numpy(flat_positions[source]).to(device),
        segments=torch.from_numpy(segments),
        token_index=torch.from_numpy(token_index).reshape(batch, width).to(device),
        num_rows=num_rows,
        num_row_tokens=row_tokens,
    )


def _check_shapes(input_ids: Tensor, *others: Tensor | None) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [batch, tokens], got shape {tuple(input_ids.shape)}")
    if input_ids.is_floating_point():
        raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
    for name, other in zip(("attention_mask", "position_ids", "scored"), others, strict=True):
        if other is not None and other.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {tuple(other.shape)}"
            )


def _find_sequences(
    batch: int, width: int, mask: np.ndarray | None, positions: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Flat [start, stop) of every sequence: a run of unmasked tokens with positions counting up."""
    valid = np.ones((batch, width), bool) if mask is None else mask
    begins = valid.copy()
    begins[:, 1:] &= ~valid[:, :-1]
    if mask is not None and (begins.sum(1) > 1).any():
        row = int(np.argmax(begins.sum(1) > 1))
        raise UnpackableBatchError(
            f"attention_mask of row {row} has a hole between tokens; expected padding at the ends"
        )
    if positions is not None and width > 1:
        step = positions[:, 1:] - positions[:, :-1]
        inside = valid[:, 1:] & valid[:, :-1]
        if (inside & (step > 1)).any():
            row = int(np.argmax((inside & (step > 1)).any(1)))
            raise UnpackableBatchError(
                f"position_ids of row {row} jump ahead; expected them to count up by 1"
            )
        begins[:, 1:] |= inside & (step != 1)
    ends = valid.copy()
    ends[:, :-1] &= ~valid[:, 1:] | begins[:, 1:]
    return np.flatnonzero(begins.reshape(-1)), np.flatnonzero(ends.reshape(-1)) + 1


def _last_scored(starts: np.ndarray, stops: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Stop of each sequence just behind its last scored place (its start if there is none)."""
    marks = np.where(scored, np.arange(1, scored.size + 1), 0)
    latest = np.maximum.accumulate(marks) if marks.size else marks
    return np.maximum(starts, np.minimum(stops, latest[stops - 1] if len(stops) else stops))


def _sort_rows(
    ids: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    first_positions: np.ndarray,
    share: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Lexicographic order of the rows and each row's common prefix with the one before it."""
    num_rows = len(starts)
    lengths = stops - starts
    if not share or num_rows < 2:
        return np.arange(num_rows), np.zeros(num_rows, np.int64)
    # Big-endian with an offset of one, so that bytes sort as ids and padding sorts first. The
    # position of the first token leads: equal ids at other positions are other tokens.
    table = np.zeros((num_rows, int(lengths.max()) + 1), ">i8")
    table[:, 0] = first_positions
    within = np.arange(table.shape[1] - 1)[None, :] < lengths[:, None]
    rows, columns = np.nonzero(within)
    table[rows, columns + 1] = ids[starts[rows] + columns] + 1
    order = np.argsort(table.view(f"V{table.shape[1] * 8}").reshape(-1), kind="stable")
    table = table[order]
    differs = table[1:] != table[:-1]
    prefix = np.where(differs.any(1), differs.argmax(1), table.shape[1]) - 1
    shorter = np.minimum(lengths[order][1:], lengths[order][:-1])
    return order, np.concatenate([[0], np.clip(prefix, 0, shorter)])


class _Segment(NamedTuple):
    rows: list[int]  # rows that pass through
    depth: int  # row tokens before it
    length: int


def _build_forest(order: np.ndarray, shared: np.ndarray, lengths: np.ndarray) -> list[_Segment]:
    """Segments of the rows, depth first. `shared[i]`: common prefix of rows `order[i-1:i+1]`."""
    forest: list[_Segment] = []
    work = [(0, len(order), 0)] if len(order) else []
    while work:
        first, last, depth = work.pop()
        if last - first == 1:
            row = int(order[first])
            if lengths[row] > depth:
                forest.append(_Segment([row], depth, int(lengths[row]) - depth))
            continue
        inner = shared[first + 1 : last]
        meet = int(inner.min())
        bounds = [first, *(first + 1 + np.flatnonzero(inner == meet)).tolist(), last]
        if meet - depth >= MIN_SHARED_TOKENS:
            forest.append(_Segment(order[first:last].tolist(), depth, meet - depth))
            depth = meet
        children = reversed(list(pairwise(bounds)))
        work.extend((begin, end, depth) for begin, end in children)
    return forest


def _lay_out(
    forest: list[_Segment], starts: np.ndarray, num_places: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bounds of every segment, the place each unique token is read from, and the way back."""
    bounds = np.zeros((len(forest), 3), np.int64)
    ends = np.cumsum([segment.length for segment in forest])
    source = np.empty(ends[-1] if forest else 0, np.int64)
    token_index = np.full(num_places, -1, np.int64)
    for i, (rows, depth, length) in enumerate(forest):
        tokens = np.arange(ends[i] - length, ends[i])
        places = starts[rows][:, None] + depth + np.arange(length)
        token_index[places] = tokens
        source[tokens] = places[0]
    # A subtree ends where the next segment that is no deeper begins.
    open_segments: list[int] = []
    for i, segment in enumerate(forest):
        while open_segments and forest[open_segments[-1]].depth >= segment.depth:
            bounds[open_segments.pop(), 2] = ends[i] - segment.length
        bounds[i, :2] = ends[i] - segment.length, ends[i]
        open_segments.append(i)
    bounds[open_segments, 2] = len(source)
    return bounds, source, token_index


def _positions(
    num_places: int, starts: np.ndarray, stops: np.ndarray, first_positions: np.ndarray
) -> np.ndarray:
    """Position of every place of the batch inside its own sequence."""
    lengths = stops - starts
    offsets = np.repeat(starts - first_positions, lengths)
    places = np.concatenate(
        [np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)] or [np.empty(0)]
    ).astype(np.int64)
    positions = np.zeros(num_places, np.int64)
    positions[places] = places - offsets
    return positions


__all__ = ["MIN_SHARED_TOKENS", "PackPlan", "UnpackableBatchError", "pack"]
