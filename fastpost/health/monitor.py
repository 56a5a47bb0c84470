"""Watches a run for illnesses that its loss does not show.

    trainer = fastpost.GRPOTrainer(..., callbacks=[HealthMonitor()])

Any `transformers.Trainer` takes it. Monitors of texts need the completions, which trainers keep
for themselves: `HealthMonitor.attach(trainer)` finds TRL's, `completions=` takes any function.

Measures are read where they are logged, gradients where they are made. Decisions depend on numbers
that are equal on every rank (logs are averaged, gradient states reduced), so all ranks stop
together; only the main process speaks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from warnings import warn

from transformers import TrainerCallback

from fastpost.health.activation_trace import ActivationTrace
from fastpost.health.chart import plot_history
from fastpost.health.dead_gradients import DeadGradients
from fastpost.health.finding import Finding
from fastpost.health.gradient_census import GradientCensus, non_finite_weights
from fastpost.health.length_drift import LengthDrift
from fastpost.health.mode_collapse import ModeCollapse
from fastpost.health.non_finite import NonFinite
from fastpost.health.openings import OverusedOpenings
from fastpost.health.reading import Reading, numbers
from fastpost.health.reward_hacking import RewardHacking
from fastpost.health.zero_variance import ZeroVarianceGroups
from fastpost.rewards.completion import Completion, completion_text
from fastpost.scoring import FastpostWarning

logger = logging.getLogger("fastpost")

_OPTIONS = ("beta", "kl_coef", "learning_rate")


class LogMonitor(Protocol):
    """A monitor of logs. `needs` are names of `reading.py`, or "completions"."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    def observe(self, reading: Reading) -> Finding | None: ...


Monitor = LogMonitor | DeadGradients | NonFinite


class HealthMonitor(TrainerCallback):
    """Runs monitors, says what they find, and stops the run where one is told to.

    A finding is said once and again only after the illness had gone; all are kept in `findings`.

    Args:
        monitors: instances with the thresholds wanted; by default one of each kind.
        completions: gives the texts (or lists of messages) drawn last.
        trace_activations: from the first step on, watch the output of every module, to name the
            one in which NaN begins. Costs a pass over every activation; otherwise the trace begins
            after the first bad step.
        history: logs kept for `report` and `plot`, the latest.

    Attributes:
        readings: the history.
        findings: what was found, bounded like the history.
    """

    def __init__(
        self,
        monitors: Sequence[Monitor] | None = None,
        *,
        completions: Callable[[], Sequence[Completion]] | None = None,
        trace_activations: bool = False,
        history: int = 10_000,
    ) -> None:
        if history < 1:
            raise ValueError(f"history must be at least 1 log, got {history}")
        self.monitors = list(monitors) if monitors is not None else _one_of_each()
        self.completions = completions
        self.trace_activations = trace_activations
        self.readings: deque[Reading] = deque(maxlen=history)
        self.findings: deque[Finding] = deque(maxlen=history)
        self._ongoing: dict[str, tuple[str, str]] = {}
        self._last_texts: list[str] = []
        self._seen: set[str] = set()
        self._census: GradientCensus | None = None
        self._trace: ActivationTrace | None = None

    @classmethod
    def attach(cls, trainer: Any, *args: Any, **kwargs: Any) -> HealthMonitor:
        """A monitor on a trainer that exists already, with the completions that TRL's GRPO and RLOO
        trainers (and ours) keep for their own tables.

        Raises:
            ValueError: the trainer keeps none and `completions` is not given.
        """
        logs = getattr(trainer, "_logs", None)
        if kwargs.get("completions") is None:
            if not isinstance(logs, dict) or "completion" not in logs:
                raise ValueError(
                    f"{type(trainer).__name__} keeps no completions; pass completions=, a function "
                    "that returns the last ones, or use callbacks=[HealthMonitor()] to do without"
                )
            kwargs["completions"] = lambda: logs["completion"]
        monitor = cls(*args, **kwargs)
        trainer.add_callback(monitor)
        return monitor

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if model is None:
            return
        if any(isinstance(monitor, DeadGradients | NonFinite) for monitor in self.monitors):
            self._census = GradientCensus(model)
        if self.trace_activations:
            self._trace = ActivationTrace(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trace is not None:
            self._trace.forget()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self._census is None:
            return
        scheduler = kwargs.get("lr_scheduler")
        rate = None if scheduler is None else float(scheduler.get_last_lr()[0])
        report = self._census.read(state.global_step + 1, rate)
        for monitor in self.monitors:
            if isinstance(monitor, DeadGradients):
                self._take(monitor.name, monitor.observe(report), state, control)
            elif isinstance(monitor, NonFinite):
                finding = monitor.observe(report, lambda: self._culprit(model))
                self._take(monitor.name, finding, state, control)
                if finding is not None:
                    self._leave_out_update(args, model)
        if not any(
            isinstance(m, NonFinite) or (isinstance(m, DeadGradients) and not m.is_done)
            for m in self.monitors
        ):
            self._census.remove()
            self._census = None

    def _culprit(self, model: Any) -> str:
        """Where the forward pass went wrong, as far as is known, in words."""
        weights = next(non_finite_weights(model), None)
        found = [] if weights is None else [f"the weights of '{weights}' are not finite"]
        if self._trace is None:
            found.append("outputs of modules are watched from the next step on")
        else:
            module = self._trace.culprit()
            found.append(
                "every module's output is finite, the loss or backward made it"
                if module is None
                else f"module '{module}' made it from finite inputs"
            )
        return ", ".join(found)

    def _leave_out_update(self, args: Any, model: Any) -> None:
        # The scaler of fp16 skips such a step by itself, and fails where it finds no gradient.
        if not args.fp16:
            for parameter in model.parameters():
                parameter.grad = None
        if self._trace is None:
            self._trace = ActivationTrace(model)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        values = numbers(logs or {})
        options = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
        reading = Reading(state.global_step, values, self._new_texts(values), options)
        self._seen |= values.keys() | ({"completions"} if reading.completions else set())
        # Texts are for the monitors alone; kept, they would grow with the run.
        self.readings.append(Reading(reading.step, reading.values))
        for monitor in self.monitors:
            if not isinstance(monitor, DeadGradients | NonFinite):
                self._take(monitor.name, monitor.observe(reading), state, control)

    def _new_texts(self, values: dict[str, float]) -> list[str]:
        """Completions, if this log speaks of rollouts and they are not those of the last log."""
        if self.completions is None or "reward" not in values:
            return []
        texts = [completion_text(completion) for completion in self.completions()]
        if texts == self._last_texts:
            return []
        self._last_texts = texts
        return texts

    def _take(self, name: str, finding: Finding | None, state: Any, control: Any) -> None:
        if finding is None:
            self._ongoing.pop(name, None)
            return
        if finding.action == "stop":
            control.should_training_stop = True
        key = finding.illness, finding.action
        if self._ongoing.get(name) == key:
            return
        self._ongoing[name] = key
        self.findings.append(finding)
        if state.is_world_process_zero:
            ending = ". Training stops" if finding.action == "stop" else ""
            warn(f"fastpost health, {finding}{ending}", FastpostWarning, stacklevel=3)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for hooks in (self._census, self._trace):
            if hooks is not None:
                hooks.remove()
        self._census = self._trace = None
        logger.info(self.report())

    def report(self) -> str:
        """One line a monitor: what it found, or that it found nothing, or what it did not see."""
        step = self.readings[-1].step if self.readings else 0
        lines = [f"health at step {step}: {len(self.findings)} findings"]
        for monitor in self.monitors:
            own = [finding for finding in self.findings if finding.monitor == monitor.name]
            missing = [name for name in getattr(monitor, "needs", ()) if name not in self._seen]
            if own:
                lines += [f"  {finding}" for finding in own]
            else:
                lines.append(f"  {monitor.name}: nothing found")
            if missing:
                lines[-1] += f" (never logged: {', '.join(missing)})"
        return "\n".join(lines)

    def plot(self, path: Any) -> Any:
        """Draw the history into a PNG file; see `plot_history`."""
        also = [name for m in self.monitors if isinstance(m, RewardHacking) for name in m.trusted]
        return plot_history(self.readings, self.findings, path, also)


def _one_of_each() -> list[Monitor]:
    return [
        RewardHacking(),
        OverusedOpenings(),
        ModeCollapse(),
        LengthDrift(),
        ZeroVarianceGroups(),
        DeadGradients(),
        NonFinite(),
    ]


__all__ = ["HealthMonitor", "LogMonitor"]
