"""What a mixture holds: shares, lengths, turns, languages, duplicates, habits of its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from fastpost.data.languages import main_language
from fastpost.data.mixture import Mixture
from fastpost.data.near_duplicates import NearDuplicates
from fastpost.data.normalisers import HABITS, habits_of, opening
from fastpost.data.rows import Row
from fastpost.data.turns import row_texts, turns

__all__ = ["MixReport", "MixReporter"]

QUANTILES = (0.5, 0.9, 0.99, 1.0)
_SHOWN = 5
_SHOWN_CHARACTERS = 100


@dataclass
class MixReport:
    """Counts over the rows of a mixture.

    Attributes:
        rows: rows seen. unit: what lengths count, "words" or "tokens".
        sources: by name: rows, share, repeats (rows that came before), length (sum), lengths.
        lengths, turns: 50 %, 90 %, 99 % and 100 % quantile.
        buckets: share of rows by length bucket.
        truncated: rows longer than the recipe's max_length; None where it has none.
        languages: share of rows by language, "und" where none is likely.
        near_duplicates: distinct rows that resemble an earlier one; with examples.
        answers: texts of the assistant. habits: share of them by habit.
        openings: the most frequent pleasantries they open with.
    """

    rows: int = 0
    unit: str = "words"
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    buckets: dict[str, float] = field(default_factory=dict)
    truncated: int | None = None
    languages: dict[str, float] = field(default_factory=dict)
    near_duplicates: int = 0
    near_duplicate_examples: list[dict[str, Any]] = field(default_factory=list)
    answers: int = 0
    habits: dict[str, float] = field(default_factory=dict)
    openings: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        def shares(given: dict[str, float]) -> str:
            return ", ".join(f"{name} {share:.1%}" for name, share in given.items()) or "none"

        quantiles = "p50 {}, p90 {}, p99 {}, max {}"
        lines = [f"{self.rows:,} rows"]
        for name, s in self.sources.items():
            lines.append(
                f"  {name}: {s['rows']:,} rows ({s['share']:.1%}), {s['repeats']:,} repeated, "
                f"{s['length']:,} {self.unit}; " + quantiles.format(*s["lengths"])
            )
        lines.append(f"{self.unit} a row: " + quantiles.format(*self.lengths))
        if self.buckets:
            lines.append(f"by length: {shares(self.buckets)}")
        if self.truncated is not None:
            lines.append(f"truncated: {self.truncated:,} rows")
        lines.append("turns a row: " + quantiles.format(*self.turns))
        lines.append(f"languages: {shares(self.languages)}")
        lines.append(f"near-duplicates: {self.near_duplicates:,} distinct rows")
        lines += [
            f"  {e['row']} ~ {e['earlier']} ({e['similarity']:.2f}): {e['text']}"
            for e in self.near_duplicate_examples
        ]
        lines.append(f"habits of {self.answers:,} answers: {shares(self.habits)}")
        lines += [f"  {count:,} x {text!r}" for text, count in self.openings.items()]
        return "\n".join(lines)


class MixReporter:
    """Looks at the rows of a mixture as they pass.

    Args:
        mixture: the rows' origin.
        near_duplicates: whether to look for them: about as long again as all else together.
    """

    def __init__(self, mixture: Mixture, near_duplicates: bool = True) -> None:
        self._mixture = mixture
        self._near = NearDuplicates() if near_duplicates else None
        self._seen: set[tuple[int, int]] = set()
        self._repeats: Counter[int] = Counter()
        self._places: list[int] = []
        self._lengths: list[int] = []
        self._turns: list[int] = []
        self._languages: Counter[str] = Counter()
        self._habits: Counter[str] = Counter()
        self._openings: Counter[str] = Counter()
        self._answers = 0

    def watch(self) -> Iterator[Row]:
        """The mixture's rows from its position on, each counted as it passes."""
        position = self._mixture.position
        for row in self._mixture:
            self._count(position, row)
            position += 1
            yield row

    def _count(self, position: int, row: Row) -> None:
        mixture = self._mixture
        source, number = int(mixture.source_at[position]), int(mixture.row_at[position])
        text = _text(row)
        self._places.append(position)
        self._lengths.append(mixture.length(row))
        self._languages[main_language(text)] += 1
        found = list(turns(row))
        self._turns.append(len(found))
        for turn in found:
            if turn.role == "assistant":
                self._answers += 1
                self._habits.update(habits_of(turn.text))
                if opened := opening(turn.text):
                    self._openings[opened[:_SHOWN_CHARACTERS]] += 1
        if (source, number) in self._seen:
            self._repeats[source] += 1
            return
        self._seen.add((source, number))
        if self._near is not None:
            self._near.add(position, text)

    def report(self) -> MixReport:
        """What the rows that passed add up to."""
        mixture, recipe = self._mixture, self._mixture.recipe
        lengths, rows = np.array(self._lengths, np.int64), len(self._places)
        source_at = mixture.source_at[self._places] if rows else np.array([], np.int16)
        made = MixReport(rows, "words" if recipe.model is None else "tokens")
        for i, name in enumerate(mixture.names):
            own = lengths[source_at == i]
            made.sources[name] = {
                "rows": len(own),
                "share": len(own) / max(1, rows),
                "repeats": self._repeats[i],
                "length": int(own.sum()),
                "lengths": _quantiles(own),
            }
        made.lengths, made.turns = _quantiles(lengths), _quantiles(np.array(self._turns))
        if recipe.length_edges:
            edges = [0, *recipe.length_edges]
            names = [f"{a}-{b - 1}" for a, b in pairwise(edges)]
            counts = np.bincount(np.digitize(lengths, edges[1:]), minlength=len(edges))
            shares = (counts / max(1, rows)).tolist()
            made.buckets = dict(zip([*names, f"{edges[-1]}+"], shares, strict=True))
        if recipe.max_length is not None:
            made.truncated = int((lengths > recipe.max_length).sum())
        made.languages = {name: n / rows for name, n in self._languages.most_common()}
        made.answers = self._answers
        made.habits = {name: self._habits[name] / max(1, self._answers) for name in HABITS}
        made.openings = dict(self._openings.most_common(_SHOWN))
        if self._near is not None:
            pairs = self._near.pairs(lambda position: _text(mixture[position]))
            made.near_duplicates = len(pairs)
            made.near_duplicate_examples = [
                self._example(*vars(p).values()) for p in pairs[:_SHOWN]
            ]
        return made

    def _example(self, row: int, earlier: int, similarity: float) -> dict[str, Any]:
        mixture = self._mixture
        names = [
            f"{mixture.names[int(mixture.source_at[k])]} row {int(mixture.row_at[k])}"
            for k in (row, earlier)
        ]
        text = " ".join(_text(mixture[row]).split())[:_SHOWN_CHARACTERS]
        return {"row": names[0], "earlier": names[1], "similarity": similarity, "text": text}


def _text(row: Row) -> str:
    return "\n".join(row_texts(row))


def _quantiles(values: Any) -> list[int]:
    if not len(values):
        return [0] * len(QUANTILES)
    return np.quantile(values, QUANTILES, method="inverted_cdf").astype(int).tolist()
