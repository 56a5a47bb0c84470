"""Completions that all begin alike: a phrase the reward likes, found and repeated."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import ClassVar

from fastpost.health.finding import Action, Finding
from fastpost.health.fixes import ENTROPY_BONUS, raise_kl
from fastpost.health.reading import Reading


@dataclass
class OverusedOpenings:
    """Share of completions with the same first words.

    Attributes:
        num_words: words (separated by white space) an opening has; five tell a phrase from a
            common sentence beginning.
        pool: latest completions looked at; the share at the start is taken when it first fills.
        max_share: share of the commonest opening above which it is over-used.
        min_growth: by how much the share must have grown since the start: a format that the prompt
            demands is there from the beginning.
        on_finding: "warn" or "stop".
    """

    num_words: int = 5
    pool: int = 64
    max_share: float = 0.5
    min_growth: float = 0.25
    on_finding: Action = "warn"
    name: ClassVar[str] = "over-used openings"
    needs: ClassVar[tuple[str, ...]] = ("completions",)
    _openings: deque[str] = field(init=False, repr=False)
    _start: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_words < 1 or self.pool < 2:
            raise ValueError(
                f"num_words is {self.num_words} and pool {self.pool}; give at least 1 and 2"
            )
        self._openings = deque(maxlen=self.pool)

    def observe(self, reading: Reading) -> Finding | None:
        for text in reading.completions:
            self._openings.append(" ".join(text.split(maxsplit=self.num_words)[: self.num_words]))
        if not reading.completions or len(self._openings) < self.pool:
            return None
        opening, count = Counter(self._openings).most_common(1)[0]
        share = count / len(self._openings)
        if self._start is None:
            self._start = share
        if share <= self.max_share or share - self._start < self.min_growth:
            return None
        return Finding(
            self.name,
            reading.step,
            "completions begin alike",
            f"{share:.0%} of the last {len(self._openings)} begin {opening!r}, against "
            f"{self.max_share:.0%} ({self._start:.0%} shared an opening at the start)",
            f"see whether the reward pays for the phrase; {raise_kl(reading.options)}, "
            f"{ENTROPY_BONUS}",
            self.on_finding,
        )


__all__ = ["OverusedOpenings"]
