"""The n-grams of evaluation sets, and where each stands; finds them exactly in other texts.

    hash of a window   h_i = sum_j mix(id_(i+j)) B^(n-1-j)  mod 2^64

computed for all windows of a batch at once by doubling (log2 n vectorised passes). A byte table of
the hashes' leading bits drops nearly all windows, a binary search most of what is left, and what
remains is compared id by id: a hash never decides alone, so a collision costs time and no match.

Memory: 20 bytes a window of the evaluation sets, their texts and words, and the byte table (at most
64 MiB). Nothing grows with what is searched.

Source: rolling hashes, Karp and Rabin, IBM J. Res. Dev. 31 (1987).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastpost.data.passages import Place, passages, require_columns_of
from fastpost.data.rolling_hash import finished, mixed, rolling
from fastpost.data.rows import DataError, Row
from fastpost.data.units import UNKNOWN, Ids, Units, stretches

__all__ = ["Hit", "NgramIndex", "Origin"]

_MAX_FILTER_BITS = 26
_MIN_FILTER_BITS = 12


@dataclass(frozen=True)
class Origin:
    """A text of an evaluation set: which set, row from 0, place within the row."""

    name: str
    row: int
    place: Place


@dataclass(frozen=True)
class Hit:
    """A stretch of a searched text in which every window of n units stands in an evaluation set.

    Attributes:
        text: number of the searched text.
        first, last: its first and last unit, both included.
        window: number of one evaluation window that it holds.
        found_in: numbers of the evaluation texts that hold one of its windows.
        new: of these, those that windows not met before by this index brought along.
    """

    text: int
    first: int
    last: int
    window: int
    found_in: NDArray[np.int64]
    new: NDArray[np.int64]


class NgramIndex:
    """All n-grams of the evaluation sets added, then `build`, then `search`.

    Args:
        units: words or tokens.
        n: units in an n-gram, at least 1.

    Raises:
        ValueError: n is below 1.
    """

    def __init__(self, units: Units, n: int = 13) -> None:
        if n < 1:
            raise ValueError(f"n={n}: an n-gram needs at least one unit; 13 is usual")
        self.units, self.n = units, n
        self.origins: list[Origin] = []
        self.texts: list[str] = []
        self.rows_of: dict[str, int] = {}
        self.short_rows_of: dict[str, int] = {}
        self._parts: list[Ids] = []
        self._met: set[int] = set()

    def add(self, name: str, rows: Iterable[Row], columns: Sequence[str] | None = None) -> None:
        """Learns an evaluation set.

        Raises:
            DataError: the name is taken, or no row has a text.
        """
        if name in self.rows_of:
            raise DataError(f"two evaluation sets are called {name!r}; give each once")
        count = short = 0
        for row in rows:
            if count == 0:
                require_columns_of(row, columns, name)
            found = list(passages(row, columns))
            ids = self.units.learn([text for _, text in found])
            short += all(len(part) < self.n for part in ids)
            for (place, text), part in zip(found, ids, strict=True):
                if len(part) >= self.n:
                    self.origins.append(Origin(name, count, place))
                    self.texts.append(text)
                    self._parts.append(part)
            count += 1
        if count == 0:
            raise DataError(f"the evaluation set {name} has no rows")
        self.rows_of[name], self.short_rows_of[name] = count, short

    def build(self) -> None:
        """Sorts what was added; call it once, before `search`."""
        self._ids, self._text_starts = _joined(self._parts)
        self._parts = []
        hashes, starts = _windows(self._ids, self.n)
        order = np.argsort(hashes, kind="stable")
        # One value more, so that a search past the end reads something; `highs` then finds nothing.
        self._ended = np.append(hashes[order], np.uint64(0))
        self._hashes, self._starts = self._ended[:-1], starts[order]
        wanted = max(1, 16 * len(hashes)).bit_length()
        bits = min(_MAX_FILTER_BITS, max(_MIN_FILTER_BITS, wanted))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, np.bool_)
        self._filter[self._hashes >> self._shift] = True

    def __len__(self) -> int:
        """Windows held, repeated ones included."""
        return len(self._hashes)

    def search(self, texts: Sequence[str]) -> list[Hit]:
        """Every stretch of `texts` made of n-grams of the evaluation sets, in order."""
        ids, text_starts = _joined(self.units.ids(texts))
        hashes, starts = _windows(ids, self.n)
        near = np.flatnonzero(self._filter[hashes >> self._shift])
        hashes, starts = hashes[near], starts[near]
        lows = np.searchsorted(self._hashes, hashes, "left")
        same = np.flatnonzero(self._ended[lows] == hashes)
        starts, lows, hashes = starts[same], lows[same], hashes[same]
        highs = np.searchsorted(self._hashes, hashes, "right")
        places: dict[int, NDArray[np.int64]] = {}
        for at, low, high in zip(starts.tolist(), lows.tolist(), highs.tolist(), strict=True):
            if (equal := self._equal(ids[at : at + self.n], low, high)).size:
                places[at] = equal
        found = np.array(sorted(places), np.int64)
        hits = []
        for first, last in stretches(found):
            text = int(np.searchsorted(text_starts, first, "right")) - 1
            start = int(text_starts[text])
            hits.append(
                self._hit(
                    text,
                    first - start,
                    last - start + self.n - 1,
                    [places[at] for at in range(first, last + 1)],
                )
            )
        return hits

    def _equal(self, gram: Ids, low: int, high: int) -> NDArray[np.int64]:
        """Starts of the windows [low, high), equal in hash, that are equal in every id."""
        starts = self._starts[low:high]
        windows = self._ids[starts[:, None] + np.arange(self.n)]
        return starts[(windows == gram).all(axis=1)]

    def _hit(self, text: int, first: int, last: int, places: list[NDArray[np.int64]]) -> Hit:
        new = [starts for starts in places if int(starts[0]) not in self._met]
        self._met.update(int(starts[0]) for starts in new)
        return Hit(
            text, first, last, int(places[0][0]), self._texts_of(places), self._texts_of(new)
        )

    def _texts_of(self, places: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        if not places:
            return np.array([], np.int64)
        starts = np.unique(np.concatenate(places))
        return np.unique(np.searchsorted(self._text_starts, starts, "right") - 1)

    def window_text(self, window: int) -> tuple[int, str]:
        """Of an evaluation window: the number of its text, and the n-gram as it stands there."""
        text = int(np.searchsorted(self._text_starts, window, "right")) - 1
        first = window - int(self._text_starts[text])
        spans = self.units.spans(self.texts[text])[first : first + self.n]
        return text, self.texts[text][spans[0][0] : spans[-1][1]]


def _joined(parts: Sequence[Ids]) -> tuple[Ids, NDArray[np.int64]]:
    """Parts one after the other, an unknown unit after each, and where each begins."""
    lengths = np.array([len(part) + 1 for part in parts], np.int64)
    ends = np.cumsum(lengths)
    ids = np.full(int(ends[-1]) if len(ends) else 0, UNKNOWN, np.int32)
    for part, end in zip(parts, ends.tolist(), strict=True):
        ids[end - 1 - len(part) : end - 1] = part
    return ids, ends - lengths


def _windows(ids: Ids, n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hash and start of each window of n known units."""
    count = len(ids) - n + 1
    if count < 1:
        return np.array([], np.uint64), np.array([], np.int64)
    unknown = np.concatenate([[0], np.cumsum(ids == UNKNOWN)])
    starts = np.flatnonzero(unknown[n:] == unknown[:count])
    return finished(rolling(mixed(ids), n)[starts]), starts
