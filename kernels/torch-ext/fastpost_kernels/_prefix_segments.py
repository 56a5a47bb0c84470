"""Segments of a prefix forest: checked once, then turned into the regions attention is made of.

`segments` [S, 3] holds (start, end, subtree_end) per segment, in depth-first order. Because of that
order the descendants of a segment are one contiguous range of tokens, [end, subtree_end). Hence the
whole attention pattern is a short list of rectangles and triangles, and no mask is ever needed:

* own: each segment's rows against themselves, causal;
* inherited: rows [end, subtree_end) against keys [start, end), everything visible.

Adjacent segments of equal length become one batched region.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

__all__ = ["PrefixSchedule", "Region", "num_visible", "schedule_of"]


@dataclass(frozen=True)
class Region:
    """Queries [query_start, query_start + count·query_length) against keys of the same `count`.

    `count` > 1 only for own regions: that many adjacent segments of one length.
    """

    query_start: int
    query_length: int
    key_start: int
    key_length: int
    count: int
    max_distance: int  # the longest way along a path from a query back to a key

    @property
    def is_own(self) -> bool:
        return self.query_start == self.key_start

    def split(self, max_count: int) -> list[Region]:
        """Returns the same region as several of at most `max_count` copies each."""
        if self.count <= max_count:
            return [self]
        pieces = []
        for first in range(0, self.count, max_count):
            start = self.query_start + first * self.query_length
            count = min(max_count, self.count - first)
            pieces.append(replace(self, query_start=start, key_start=start, count=count))
        return pieces


@dataclass(frozen=True)
class PrefixSchedule:
    """Regions and path positions of one forest.

    Every token is a query of exactly one region in `own`, and of one in `inherited` per ancestor.
    """

    segments: tuple[tuple[int, int, int], ...]
    spans: tuple[tuple[int, int], ...]  # per segment: path position of its first token, length
    own: tuple[Region, ...]
    inherited: tuple[Region, ...]

    @cached_property
    def positions(self) -> Tensor:
        """[N] (int64, CPU): each token's distance from the root of its path."""
        return torch.cat([torch.arange(base, base + length) for base, length in self.spans])

    def num_pairs(self, window: int | None) -> int:
        """Number of (query, key) pairs: each token sees its path, or the last `window` of it."""
        return sum(num_visible(base, length, window) for base, length in self.spans)


def num_visible(base: int, length: int, window: int | None) -> int:
    """Σ min(p + 1, window) over the `length` path positions p from `base` on."""
    whole = length if window is None else min(max(window - base, 0), length)
    pairs = whole * base + whole * (whole + 1) // 2
    return pairs if window is None else pairs + (length - whole) * window


def schedule_of(segments: Tensor, num_tokens: int) -> PrefixSchedule:
    """Returns the schedule of `segments` [S, 3]; repeated calls with equal segments are cached.

    Raises:
        ValueError: if the segments do not tile [0, num_tokens) in order, are empty, or do not nest.
    """
    return _build_schedule(tuple(map(tuple, segments.tolist())), num_tokens)


@lru_cache(maxsize=16)
def _build_schedule(segments: tuple[tuple[int, int, int], ...], num_tokens: int) -> PrefixSchedule:
    bases = _path_bases(segments, num_tokens)
    own: list[Region] = []
    inherited: list[Region] = []
    for index, (start, end, subtree_end) in enumerate(segments):
        length = end - start
        if own and own[-1].query_length == length:
            previous = own.pop()
            first, count = previous.query_start, previous.count + 1
        else:
            first, count = start, 1
        own.append(Region(first, length, first, length, count, length - 1))
        if subtree_end > end:
            below = (
                base + stop - first
                for base, (first, stop, _) in zip(bases[index:], segments[index:], strict=True)
                if stop <= subtree_end
            )
            farthest = max(below) - 1 - bases[index]
            inherited.append(Region(end, subtree_end - end, start, length, 1, farthest))
    spans = tuple(
        (base, end - start) for base, (start, end, _) in zip(bases, segments, strict=True)
    )
    return PrefixSchedule(segments, spans, tuple(own), tuple(inherited))


def _path_bases(segments: tuple[tuple[int, int, int], ...], num_tokens: int) -> list[int]:
    """Checks tiling and nesting; returns the path position of each segment's first token."""
    bases: list[int] = []
    open_segments: list[tuple[int, int]] = []  # (subtree_end, path position after the segment)
    expected_start = 0
    for index, (start, end, subtree_end) in enumerate(segments):
        row = f"segments[{index}] = ({start}, {end}, {subtree_end})"
        if start != expected_start:
            raise ValueError(
                f"{row} must start at {expected_start}, where the segment before it ends: "
                "segments tile the tokens in depth-first order"
            )
        if end <= start:
            raise ValueError(f"{row} is empty; leave segments without tokens out")
        while open_segments and open_segments[-1][0] <= start:
            open_segments.pop()
        limit = open_segments[-1][0] if open_segments else num_tokens
        if not end <= subtree_end <= limit:
            raise ValueError(
                f"{row} does not nest: its subtree_end must lie in [{end}, {limit}], "
                "inside the subtree of the segment above it"
            )
        base = open_segments[-1][1] if open_segments else 0
        bases.append(base)
        open_segments.append((subtree_end, base + end - start))
        expected_start = end
    if expected_start != num_tokens:
        raise ValueError(
            f"segments cover {expected_start} tokens, but there are {num_tokens}; "
            "the last segment must end at the last token"
        )
    return bases
