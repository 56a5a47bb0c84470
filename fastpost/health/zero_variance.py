"""Groups whose completions all have the same reward: no advantage, nothing to learn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fastpost.health.finding import Action, Finding
from fastpost.health.reading import Reading
from fastpost.health.series import Series


@dataclass
class ZeroVarianceGroups:
    """Share of groups without any spread of rewards.

    Attributes:
        window: readings a mean is taken over.
        max_share: above one half, most of what is sampled is thrown away.
        on_finding: "warn" or "stop".
    """

    window: int = 10
    max_share: float = 0.5
    on_finding: Action = "warn"
    name: ClassVar[str] = "zero-variance groups"
    needs: ClassVar[tuple[str, ...]] = ("zero_std_share",)
    _share: Series = field(init=False, repr=False)
    _reward: Series = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._share, self._reward = Series(self.window), Series(self.window)

    def observe(self, reading: Reading) -> Finding | None:
        share, reward = reading.get("zero_std_share"), reading.get("reward")
        if reward is not None:
            self._reward.add(reward)
        if share is None:
            return None
        self._share.add(share)
        if not self._share.is_full or self._share.recent <= self.max_share:
            return None
        level = f", mean reward {self._reward.recent:.3g}" if self._reward.count else ""
        return Finding(
            self.name,
            reading.step,
            "most groups teach nothing",
            f"{self._share.recent:.0%} of groups have one reward throughout against "
            f"{self.max_share:.0%}{level}",
            "harder prompts if most are solved, easier ones if none is, more generations per "
            "prompt, or a reward with more than two values",
            self.on_finding,
        )


__all__ = ["ZeroVarianceGroups"]
