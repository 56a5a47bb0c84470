"""The policy says ever fewer things: entropy, variety of words, spread of rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fastpost.health.finding import Action, Finding
from fastpost.health.fixes import ENTROPY_BONUS, lower_learning_rate, raise_kl
from fastpost.health.reading import Reading
from fastpost.health.series import Series

# Fewer texts say nothing about variety.
_MIN_COMPLETIONS = 4


def distinct_ngrams(texts: Sequence[str], n: int = 2) -> float | None:
    """Distinct-n (Li 2016): different n-grams of words by all n-grams, over all texts together.

    Words are separated by white space. None where the texts hold no n-gram.
    """
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else None


@dataclass
class ModeCollapse:
    """Entropy, distinct-2 and reward spread against what they were at the start.

    Only logs with a reward are read: a supervised run is meant to lose entropy.

    Attributes:
        window: readings a mean is taken over; the first `window` readings are the start.
        entropy_share: of the start. RL runs that go on learning keep a third and more; those that
            collapse lose nine tenths (Cui 2025, "The entropy mechanism").
        distinct_share: of the start; half the variety gone is more than a narrower task explains.
        std_share: of the start, for `reward_std`, and only while the reward has not risen: rewards
            that agree because all are high are success.
        on_finding: "warn" or "stop".
    """

    window: int = 10
    entropy_share: float = 0.3
    distinct_share: float = 0.5
    std_share: float = 0.1
    on_finding: Action = "warn"
    name: ClassVar[str] = "mode collapse"
    needs: ClassVar[tuple[str, ...]] = ("entropy", "reward_std", "completions")
    _series: dict[str, Series] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        names = ("entropy", "distinct", "reward_std", "reward")
        self._series = {name: Series(self.window) for name in names}

    def observe(self, reading: Reading) -> Finding | None:
        if not reading.is_of_rollouts:
            return None
        values = dict(reading.values)
        if len(reading.completions) >= _MIN_COMPLETIONS:
            distinct = distinct_ngrams(reading.completions)
            if distinct is not None:
                values["distinct"] = distinct
        for name, series in self._series.items():
            if name in values:
                series.add(values[name])
        for illness, figures in self._fallen():
            fix = (
                f"{ENTROPY_BONUS}, {raise_kl(reading.options)}, or "
                f"{lower_learning_rate(reading.options)}"
            )
            return Finding(self.name, reading.step, illness, figures, fix, self.on_finding)
        return None

    def _fallen(self) -> Iterator[tuple[str, str]]:
        for name, share, illness, what in (
            ("entropy", self.entropy_share, "entropy collapses", "entropy"),
            ("distinct", self.distinct_share, "completions repeat each other", "distinct-2"),
            ("reward_std", self.std_share, "rewards lose their spread", "reward_std"),
        ):
            series = self._series[name]
            if not series.has_moved_on or series.recent >= share * series.start:
                continue
            if name == "reward_std" and self._reward_rose():
                continue
            yield (
                illness,
                f"{what} {series.start:.3g} -> {series.recent:.3g}, "
                f"{series.recent / series.start:.0%} of the start against {share:.0%}",
            )

    def _reward_rose(self) -> bool:
        reward = self._series["reward"]
        return reward.recent > reward.start + 2 * reward.noise


__all__ = ["ModeCollapse", "distinct_ngrams"]
