"""NaN and infinity in gradients: where they begin, and an end after too many steps.

Backward runs from the loss to the input. A value that becomes non-finite on the way back spoils the
gradients of everything before it: the last bad tensor in network order is next to the culprit. If
all are bad the forward pass, or the loss, made it; the trace of activations then names the module.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from fastpost.health.finding import Action, Finding
from fastpost.health.fixes import lower_learning_rate
from fastpost.health.gradient_census import GradientReport, GradientState


@dataclass
class NonFinite:
    """Steps with a non-finite gradient.

    Each is a finding and its update is left out (NaN in a gradient is NaN in every weight after
    it); with `on_finding="stop"` training ends at the `max_bad_steps`-th.

    Attributes:
        max_bad_steps: within `window` steps. One may be a bad batch, three are the model.
        window: optimizer steps looked back.
        on_finding: "stop", or "warn" to go on for ever.
    """

    max_bad_steps: int = 3
    window: int = 20
    on_finding: Action = "stop"
    name: ClassVar[str] = "NaN or infinity"
    _bad: deque[bool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.max_bad_steps <= self.window:
            raise ValueError(
                f"max_bad_steps is {self.max_bad_steps}; give 1 to window ({self.window})"
            )
        self._bad = deque(maxlen=self.window)

    def observe(
        self, report: GradientReport, culprit: Callable[[], str] = lambda: ""
    ) -> Finding | None:
        """`culprit` says where the forward pass went wrong; asked only of a bad step."""
        names = report.names(GradientState.NON_FINITE)
        self._bad.append(bool(names))
        if not names:
            return None
        count = sum(self._bad)
        reached = [name for name, state in report.states.items() if state != GradientState.ABSENT]
        where = f"first '{names[0]}'"
        if len(names) < len(reached):
            where += f", last '{names[-1]}' (backward came from there)"
        found = culprit()
        options = {} if report.learning_rate is None else {"learning_rate": report.learning_rate}
        return Finding(
            self.name,
            report.step,
            "gradients are not finite, the update is left out",
            f"{len(names)} of {len(reached)} tensors, {where}"
            + (f"; {found}" if found else "")
            + f"; bad step {count} against {self.max_bad_steps} in {self.window}",
            f"{lower_learning_rate(options)}, bf16 instead of fp16, or fp32 for the part named",
            self.on_finding if count >= self.max_bad_steps else "warn",
        )


__all__ = ["NonFinite"]
