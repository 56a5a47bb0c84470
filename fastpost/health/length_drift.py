"""Completions grow or shrink far beyond what they were, or are cut off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from fastpost.health.finding import Action, Finding
from fastpost.health.fixes import LENGTH_PENALTY, raise_kl
from fastpost.health.reading import Reading
from fastpost.health.series import Series


@dataclass
class LengthDrift:
    """Mean completion length against its start, in both directions, and the truncated share.

    Attributes:
        window: readings a mean is taken over; the first `window` readings are the start.
        max_growth: of the start; 2 because a reward that pays for length doubles it quickly, while
            answers that get better grow by tens of per cent.
        min_shrinkage: of the start; its inverse.
        max_truncated: share of completions that reach the limit: their reward is of an unfinished
            answer, and above a third it decides what is learnt.
        on_finding: "warn" or "stop".
    """

    window: int = 10
    max_growth: float = 2.0
    min_shrinkage: float = 0.5
    max_truncated: float = 0.3
    on_finding: Action = "warn"
    name: ClassVar[str] = "length drift"
    needs: ClassVar[tuple[str, ...]] = ("mean_length", "truncated_share")
    _length: Series = field(init=False, repr=False)
    _truncated: Series = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._length, self._truncated = Series(self.window), Series(self.window)

    def observe(self, reading: Reading) -> Finding | None:
        for name, series in (
            ("mean_length", self._length),
            ("truncated_share", self._truncated),
        ):
            value = reading.get(name)
            if value is not None:
                series.add(value)
        for illness, figures, fix in self._drifted(reading):
            return Finding(self.name, reading.step, illness, figures, fix, self.on_finding)
        return None

    def _drifted(self, reading: Reading) -> Iterator[tuple[str, str, str]]:
        length, truncated = self._length, self._truncated
        if length.has_moved_on and length.start > 0:
            ratio = length.recent / length.start
            figures = f"mean length {length.start:.0f} -> {length.recent:.0f} tokens, {ratio:.2g}x"
            if ratio > self.max_growth:
                yield "completions grow", f"{figures} against {self.max_growth:g}x", LENGTH_PENALTY
            if ratio < self.min_shrinkage:
                yield (
                    "completions shrink",
                    f"{figures} against {self.min_shrinkage:g}x",
                    f"see whether the reward punishes length; {raise_kl(reading.options)}",
                )
        if truncated.is_full and truncated.recent > self.max_truncated:
            yield (
                "completions are cut off",
                f"{truncated.recent:.0%} reach the length limit against {self.max_truncated:.0%}",
                f"a larger max_completion_length, or {LENGTH_PENALTY}",
            )


__all__ = ["LengthDrift"]
