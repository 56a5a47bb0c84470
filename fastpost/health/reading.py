"""One log of a trainer under names that do not depend on the trainer.

| here | GRPO, RLOO | PPO | Online DPO |
|---|---|---|---|
| reward | reward | reward | objective/scores |
| reward_std | reward_std | reward_std | |
| zero_std_share | frac_reward_zero_std | | |
| kl (mean per token) | kl | kl | |
| sequence_kl (sum per completion) | | kl_per_completion | objective/kl |
| entropy | entropy | entropy | objective/entropy |
| mean_length (tokens) | completions/mean_length | completions/mean_length | |
| truncated_share | completions/clipped_ratio | 1 - completions/ended | 1 - val/contain_eos_token |

KTO logs a `kl`, DPO and SFT an `entropy`: no completions are drawn there, so no `reward` is logged,
and the monitors of drawn completions stay silent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_LOGGED_AS = {
    "reward": ("reward", "objective/scores"),
    "reward_std": ("reward_std",),
    "zero_std_share": ("frac_reward_zero_std",),
    "kl": ("kl",),
    "sequence_kl": ("kl_per_completion", "objective/kl"),
    "entropy": ("entropy", "objective/entropy"),
    "mean_length": ("completions/mean_length",),
    "truncated_share": ("completions/clipped_ratio",),
}
_ENDED_SHARE = ("completions/ended", "val/contain_eos_token")


@dataclass(frozen=True)
class Reading:
    """What one log says.

    Attributes:
        step: optimizer step.
        values: finite numbers, under the names above and under the names they were logged as.
        completions: texts drawn since the last reading, empty where nothing gives them.
        options: hyperparameters a remedy may name (`beta`, `learning_rate`, ...).
    """

    step: int
    values: Mapping[str, float]
    completions: Sequence[str] = ()
    options: Mapping[str, float] = field(default_factory=dict)

    def get(self, name: str) -> float | None:
        return self.values.get(name)

    @property
    def is_of_rollouts(self) -> bool:
        """Whether the log speaks of completions that the policy drew."""
        return "reward" in self.values


def numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a log, under its own names and those of this file."""
    values = {
        name: float(value)
        for name, value in logs.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    for name, logged in _LOGGED_AS.items():
        for candidate in logged:
            if candidate in values:
                values[name] = values[candidate]
                break
    for candidate in _ENDED_SHARE:
        if "truncated_share" not in values and candidate in values:
            values["truncated_share"] = 1 - values[candidate]
    return values


__all__ = ["Reading", "numbers"]
