"""The reward rises and what it stands for falls, or the policy has left its reference.

Over-optimisation (Gao 2022): a proxy goes on rising after the true reward has passed its peak. So a
trusted measure (reward on held-out prompts, a judge that is logged but not trained on) is compared
with its own peak, and the trained reward with what it was at that peak.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from fastpost.health.finding import Action, Finding
from fastpost.health.fixes import lower_learning_rate, raise_kl
from fastpost.health.reading import Reading
from fastpost.health.series import Series

# A measure that hardly moves has no noise to compare with; then this share of its range counts.
_RANGE_SHARE = 0.02


@dataclass
class RewardHacking:
    """Trained reward up, trusted reward down; or KL beyond a limit.

    Attributes:
        trusted: names of logged measures that are not trained on: "eval_reward" (TRL's, over
            held-out prompts), or "rewards/<function>/mean" of a function with weight 0.
        window: readings a mean is taken over; one evaluation counts as a mean already.
        significance: standard deviations by which both must have moved since the peak. A peak is
            the luckiest of many means: at 3, 79 % of simulated runs of 300 readings with a level,
            noisy judge raised a false alarm; at 5, one of 200 did.
        max_kl: nats per token. Per-token KL of RL runs that keep their skills stays below 0.1-0.2.
        max_sequence_kl: nats per completion, where only that is logged; InstructGPT and its
            successors end below 30.
        on_finding: "warn" or "stop".
    """

    trusted: tuple[str, ...] = ("eval_reward",)
    window: int = 10
    significance: float = 5.0
    max_kl: float = 0.5
    max_sequence_kl: float = 50.0
    on_finding: Action = "warn"
    name: ClassVar[str] = "reward hacking"
    _series: dict[str, Series] = field(default_factory=dict, init=False, repr=False)
    _extremes: dict[str, tuple[float, float]] = field(default_factory=dict, init=False, repr=False)
    # Of each trusted measure: its highest mean and the trained reward's mean at that time.
    _peaks: dict[str, tuple[float, float]] = field(default_factory=dict, init=False, repr=False)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reward", "kl", *self.trusted)

    def observe(self, reading: Reading) -> Finding | None:
        for name in ("reward", "kl", "sequence_kl", *self.trusted):
            value = reading.get(name)
            if value is not None:
                self._add(name, value)
        for illness, figures in (*self._parted(reading), *self._strayed(reading)):
            fix = f"{raise_kl(reading.options)}, or {lower_learning_rate(reading.options)}"
            return Finding(self.name, reading.step, illness, figures, fix, self.on_finding)
        return None

    def _add(self, name: str, value: float) -> None:
        window = 1 if name.startswith("eval_") else self.window
        self._series.setdefault(name, Series(window)).add(value)
        low, high = self._extremes.get(name, (value, value))
        self._extremes[name] = min(low, value), max(high, value)

    def _chance(self, name: str) -> float:
        """How far the measure's mean moves without meaning anything."""
        low, high = self._extremes[name]
        return max(self.significance * self._series[name].noise, _RANGE_SHARE * (high - low))

    def _parted(self, reading: Reading) -> Iterator[tuple[str, str]]:
        reward = self._series.get("reward")
        if reward is None or not reward.is_full:
            return
        for name in self.trusted:
            if name not in reading.values or not self._series[name].is_full:
                continue
            now, reward_now = self._series[name].recent, reward.recent
            peak, reward_then = self._peaks.get(name, (now, reward_now))
            if now >= peak:
                self._peaks[name] = now, reward_now
                continue
            fall, rise = peak - now, reward_now - reward_then
            if fall > self._chance(name) and rise > self._chance("reward"):
                yield (
                    f"reward rises while {name} falls",
                    f"reward {reward_then:.3g} -> {reward_now:.3g}, {name} {peak:.3g} -> {now:.3g} "
                    f"(both beyond chance, {self._chance('reward'):.2g} and "
                    f"{self._chance(name):.2g})",
                )

    def _strayed(self, reading: Reading) -> Iterator[tuple[str, str]]:
        if not reading.is_of_rollouts:
            return
        for name, limit, unit in (
            ("kl", self.max_kl, "token"),
            ("sequence_kl", self.max_sequence_kl, "completion"),
        ):
            series = self._series.get(name)
            # Where both are logged the per-token one decides: it does not grow with length.
            if series is None or not series.is_full or (unit != "token" and "kl" in self._series):
                continue
            if series.recent > limit:
                reward = self._series["reward"]
                yield (
                    "the policy has left its reference",
                    f"KL {series.recent:.3g} nats per {unit} against {limit:g}, reward "
                    f"{reward.start:.3g} -> {reward.recent:.3g}",
                )


__all__ = ["RewardHacking"]
