"""Trainable tensors that no gradient reaches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fastpost.health.finding import Action, Finding
from fastpost.health.gradient_census import GradientReport, GradientState

_SHOWN_NAMES = 4


@dataclass
class DeadGradients:
    """Gradients that are absent or exactly zero in each of the first steps.

    Attributes:
        steps: optimizer steps with a learning rate looked at. LoRA's A has a zero gradient until B
            has moved, so one is too few; 4 also lets a mixture's rare experts get a token.
        on_finding: "warn" or "stop".
    """

    steps: int = 4
    on_finding: Action = "warn"
    name: ClassVar[str] = "dead gradients"
    _seen: int = field(default=0, init=False, repr=False)
    _dead: dict[str, GradientState] = field(default_factory=dict, init=False, repr=False)

    @property
    def is_done(self) -> bool:
        """Whether everything that there is to see has been seen."""
        return self._seen >= self.steps

    def observe(self, report: GradientReport) -> Finding | None:
        # In a warm-up that begins at 0 the weights do not move, and what follows from them neither.
        if self.is_done or (report.learning_rate == 0):
            return None
        now = {name: state for name, state in report.states.items() if state <= GradientState.ZERO}
        if self._seen:
            now = {name: max(now[name], self._dead[name]) for name in now if name in self._dead}
        self._dead = now
        self._seen += 1
        if not self.is_done or not self._dead:
            return None
        if len(self._dead) == len(report.states):
            illness = "no tensor gets a gradient"
            fix = (
                "see whether anything is scored (labels, completion mask), and whether rewards "
                "within a group differ"
            )
        else:
            illness = "some trainable tensors get no gradient"
            fix = "freeze them (requires_grad_(False)), or see why the loss does not reach them"
        return Finding(
            self.name,
            report.step,
            illness,
            f"{len(self._dead)} of {len(report.states)} in each of the first {self.steps} steps: "
            + self._names(),
            fix,
            self.on_finding,
        )

    def _names(self) -> str:
        shown = [
            f"'{name}' ({'zero' if state == GradientState.ZERO else 'none'})"
            for name, state in list(self._dead.items())[:_SHOWN_NAMES]
        ]
        more = len(self._dead) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


__all__ = ["DeadGradients"]
