"""What a monitor says: one line with the illness, its figures and a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What a monitor's finding does: only said, or said and training ends after this step.
Action = Literal["warn", "stop"]


@dataclass(frozen=True)
class Finding:
    """One illness found at one step.

    Attributes:
        monitor: name of the monitor.
        step: optimizer step of the reading.
        illness: what is wrong, the same words every time, so that repetition can be told.
        figures: what was measured against which threshold.
        fix: what to try.
        action: "warn" or "stop".
    """

    monitor: str
    step: int
    illness: str
    figures: str
    fix: str
    action: Action

    def __str__(self) -> str:
        return f"step {self.step}, {self.monitor}: {self.illness}; {self.figures}; try: {self.fix}"


__all__ = ["Action", "Finding"]
