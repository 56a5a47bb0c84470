"""Rows that say nearly the same, found without comparing each with each.

MinHash: of 64 hash functions over a text's shingles (runs of 5 words) the smallest values; two
texts agree in a value with probability J, the Jaccard similarity of their shingle sets. Texts that
agree in one of 16 bands of 4 values are candidates (a pair with J = 0.8 is missed once in 5,000),
and each candidate is then compared exactly, so a reported pair is one.

datasketch does the same one text at a time in Python objects; here a row is 128 bytes.

Source: Broder, SEQUENCES 1997; banding: Leskovec et al., Mining of Massive Datasets, section 3.4.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastpost.data.rolling_hash import finished, mixed, rolling
from fastpost.data.units import words

__all__ = ["NearDuplicate", "NearDuplicates", "jaccard", "shingles"]

SHINGLE, BANDS, BAND_VALUES = 5, 16, 4

_rng = np.random.default_rng(0)
_FACTORS = _rng.integers(0, 1 << 63, BANDS * BAND_VALUES).astype(np.uint64) * np.uint64(
    2
) + np.uint64(1)
_TERMS = _rng.integers(0, 1 << 63, BANDS * BAND_VALUES).astype(np.uint64)


@dataclass(frozen=True)
class NearDuplicate:
    """A row, the earlier row it resembles, and their exact Jaccard similarity."""

    row: int
    earlier: int
    similarity: float


def shingles(text: str) -> NDArray[np.uint64]:
    """Distinct hashes of the text's runs of 5 words; of all its words where there are fewer."""
    units = words(text)
    if not units:
        return np.array([], np.uint64)
    ids = np.array([zlib.crc32(unit.encode("utf-8", "surrogatepass")) for unit in units])
    return np.unique(finished(rolling(mixed(ids), min(SHINGLE, len(units)))))


def jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Jaccard similarity of two sets given as sorted arrays; 0 for two empty ones."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)


class NearDuplicates:
    """Texts added one by one, then the pairs among them.

    Args:
        threshold: Jaccard similarity from which two rows are near-duplicates.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        self.threshold = threshold
        self._rows: list[int] = []
        self._bands: list[NDArray[np.uint64]] = []

    def add(self, row: int, text: str) -> None:
        """Takes the signature of a row's text; one without words is left out."""
        found = shingles(text)
        if not len(found):
            return
        smallest = np.empty(BANDS * BAND_VALUES, np.uint64)
        for i in range(0, len(smallest), BAND_VALUES):  # a band at a time stays in cache
            span = slice(i, i + BAND_VALUES)
            hashed = found * _FACTORS[span, None] + _TERMS[span, None]
            smallest[span] = (hashed ^ (hashed >> np.uint64(29))).min(axis=1)
        self._rows.append(row)
        self._bands.append(finished(rolling(mixed(smallest), BAND_VALUES)[::BAND_VALUES]))

    def pairs(self, text_of: Callable[[int], str]) -> list[NearDuplicate]:
        """Each row that resembles an earlier one, once, with the most similar that was tried.

        A row is tried against the first row and the one just before it of every band they share.

        Args:
            text_of: a row's text again, by the number it was added under.
        """
        if not self._rows:
            return []
        keys = np.stack(self._bands)
        candidates: set[tuple[int, int]] = set()
        for band in keys.T:
            order = np.argsort(band, kind="stable")
            is_first = np.r_[True, band[order][1:] != band[order][:-1]]
            first = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
            later = np.flatnonzero(~is_first)
            here = order[later].tolist()
            for earlier in (order[later - 1].tolist(), order[first[later]].tolist()):
                candidates.update(zip(here, earlier, strict=True))
        best: dict[int, NearDuplicate] = {}
        for here, before in sorted(candidates):
            row, earlier = self._rows[here], self._rows[before]
            similarity = jaccard(shingles(text_of(row)), shingles(text_of(earlier)))
            if similarity >= self.threshold and (
                row not in best or best[row].similarity < similarity
            ):
                best[row] = NearDuplicate(row, earlier, similarity)
        return list(best.values())
