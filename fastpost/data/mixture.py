"""A mixture of sources in which every position has its row: deterministic, resumable anywhere.

Shares are exact, not drawn: each source and, within it, each length bucket gets a whole number of
rows (largest remainders), its rows are taken in a seeded order, again from the start where there
are more places than rows, and one seeded permutation of all places is the order of the mixture. So
row k depends on the recipe and k alone, and to resume is to go on at k.

Memory: 10 bytes a place, 8 (JSONL) or none (Arrow) a row of the sources, 4 where lengths count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpost.data.mix_recipe import MixRecipe
from fastpost.data.normalisers import normalise_row
from fastpost.data.passages import require_columns_of
from fastpost.data.row_store import open_store
from fastpost.data.rows import DataError, Row
from fastpost.data.turns import row_texts
from fastpost.data.units import TokenUnits, words

__all__ = ["Mixture", "apportion", "row_length"]


class Mixture:
    """The rows of a recipe, by position or as a stream that can be resumed.

    Args:
        recipe: the sources and their shares.
        tokenizer: measures lengths; None for words. Its name belongs into `recipe.model`.

    Attributes:
        source_at: [rows] int16, number of the source of each place.
        row_at: [rows] int64, number of the row in its source.
        length_at: [rows] int32 in words or tokens; None if the recipe asks for no lengths.
        position: the place that iteration yields next.

    Raises:
        DataError: a source cannot be read, or the recipe's shares cannot be had from the sources.
    """

    def __init__(self, recipe: MixRecipe, tokenizer: Any = None) -> None:
        self.recipe = recipe
        self.names = list(recipe.sources)
        self.stores = [open_store(s.data, s.split) for s in recipe.sources.values()]
        for name, store in zip(self.names, self.stores, strict=True):
            require_columns_of(store[0], None, name)
        self._units = TokenUnits(tokenizer) if tokenizer is not None else None
        self.position = 0
        lengths = None
        if recipe.length_edges or recipe.max_length is not None:
            lengths = [
                np.array([self.length(store[i]) for i in range(len(store))], np.int32)
                for store in self.stores
            ]
        self._plan(lengths)

    def length(self, row: Row) -> int:
        """Words or tokens in the texts of a row; what a chat template adds is not counted."""
        return row_length(row, self._units)

    def _plan(self, lengths: list[NDArray[np.int32]] | None) -> None:
        edges, seed = self.recipe.length_edges, self.recipe.seed
        buckets = [
            np.digitize(lengths[i], edges) if lengths and edges else np.zeros(len(store), np.int64)
            for i, store in enumerate(self.stores)
        ]
        sizes = np.array([np.bincount(b, minlength=len(edges) + 1) for b in buckets])
        places = self._with_long_share(
            np.array([apportion(q, s) for q, s in zip(self._quotas(), sizes, strict=True)]), sizes
        )
        sources, rows = [], []
        for source, bucket in np.argwhere(places).tolist():
            members = np.flatnonzero(buckets[source] == bucket)
            wanted, epoch = int(places[source, bucket]), 0
            while wanted:
                order = np.random.default_rng([seed, source, bucket, epoch])
                taken = order.permutation(members)[:wanted]
                sources.append(np.full(len(taken), source, np.int16))
                rows.append(taken)
                wanted, epoch = wanted - len(taken), epoch + 1
        shuffled = np.random.default_rng(seed).permutation(int(places.sum()))
        self.source_at = np.concatenate(sources)[shuffled]
        self.row_at = np.concatenate(rows)[shuffled]
        self.length_at = None
        if lengths is not None:
            first = np.cumsum([0, *map(len, lengths)])[self.source_at]
            self.length_at = np.concatenate(lengths)[first + self.row_at]

    def _quotas(self) -> list[int]:
        """Rows of each source."""
        sources = list(self.recipe.sources.values())
        counted = sum(s.count or 0 for s in sources)
        free = [i for i, s in enumerate(sources) if s.count is None]
        rows = self.recipe.rows
        if rows is None:
            rows = counted + sum(len(self.stores[i]) for i in free)
        if counted > rows or (counted < rows and not free):
            raise DataError(
                f"rows: {rows}, but the sources' counts add up to {counted}; leave rows out, or "
                "give a source a weight instead of a count"
            )
        weights = np.array([float(sources[i].weight or len(self.stores[i])) for i in free])
        # Over the largest, so that a low temperature does not overflow.
        shares = (weights / weights.max()) ** (1 / self.recipe.temperature) if free else weights
        quotas = [s.count or 0 for s in sources]
        for i, quota in zip(free, apportion(rows - counted, shares).tolist(), strict=True):
            quotas[i] = quota
        return quotas

    def _with_long_share(
        self, places: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Places [sources, buckets] with enough in the last bucket; each source keeps its sum."""
        total = int(places.sum())
        missing = int(np.ceil(round(self.recipe.long_share * total, 6))) - int(places[:, -1].sum())
        if missing <= 0:
            return places
        free = np.where(sizes[:, -1] > 0, places[:, :-1].sum(axis=1), 0)
        if free.sum() < missing:
            reached = (int(free.sum()) + int(places[:, -1].sum())) / max(1, total)
            raise DataError(
                f"long_share: {self.recipe.long_share}, but sources with rows of "
                f"{self.recipe.length_edges[-1]} or more fill {reached:.1%} of the mixture at "
                "most; lower it, lower the last of length_edges, or weigh those sources more"
            )
        added = apportion(missing, free)
        for source in np.flatnonzero(added):
            left = int(places[source, :-1].sum() - added[source])
            places[source, :-1] = apportion(left, places[source, :-1])
            places[source, -1] += added[source]
        return places

    def __len__(self) -> int:
        return len(self.row_at)

    def __getitem__(self, position: int) -> Row:
        """The row at a place, normalised as the recipe says."""
        store = self.stores[int(self.source_at[position])]
        return normalise_row(store[int(self.row_at[position])], self.recipe.normalise)

    def __iter__(self) -> Iterator[Row]:
        """Rows from `position` on; it stands after the row that was yielded last."""
        while self.position < len(self):
            self.position += 1
            yield self[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, JSON-ready."""
        return {"position": self.position, "plan": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a stream of the same recipe and data stood.

        Raises:
            DataError: the recipe, the data or numpy's permutations are not the same any more.
        """
        position = state.get("position")
        if state.get("plan") != self.digest:
            raise DataError(
                "the saved position belongs to another mixture: recipe, data or the numpy version "
                "changed since; restore them, or begin anew"
            )
        if not isinstance(position, int) or not 0 <= position <= len(self):
            raise DataError(f"position: {position!r}, expected 0 to {len(self)}")
        self.position = position

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the rows and their order."""
        digest = hashlib.sha256(repr((self.names, self.recipe.normalise)).encode())
        for store in self.stores:
            digest.update(store.digest().encode())
        digest.update(self.source_at.tobytes() + self.row_at.tobytes())
        return digest.hexdigest()


def row_length(row: Row, units: TokenUnits | None) -> int:
    """Words, or tokens of `units`, in the texts of a row."""
    texts = row_texts(row)
    if units is not None:
        return sum(map(len, units.ids(texts)))
    return sum(len(words(text)) for text in texts)


def apportion(total: int, shares: Any) -> NDArray[np.int64]:
    """Whole numbers in proportion to `shares` that add up to `total` (largest remainders).

    Ties go to the first. Nothing goes to a share of 0; all shares 0 give zeros.
    """
    shares = np.asarray(shares, np.float64)
    if total == 0 or shares.sum() == 0:
        return np.zeros(len(shares), np.int64)
    exact = shares / shares.sum() * total
    whole = np.floor(exact + 1e-9).astype(np.int64)
    left = total - int(whole.sum())
    order = np.argsort(-np.where(shares > 0, exact - whole, -1.0), kind="stable")
    whole[order[:left]] += 1
    return whole
