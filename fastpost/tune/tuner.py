"""Measures the options of a choice against its default, and keeps what is right and faster.

An option, the default too, must first be right: at most twice as far from a float32 truth as plain
torch in the tested dtype, plus one rounding (`fastpost_kernels.testing`), with memory that starts
as NaN and lies between bands. Only then is it timed. It wins with a gain of MIN_GAIN or more, so
that noise changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.doctor.guarded_memory import GuardedMemory
from fastpost.tune.stopwatch import Stopwatch
from fastpost.tune.subjects import Subject, Tensors
from fastpost_kernels._choices import CHOICES, Table, override
from fastpost_kernels.testing import errors_and_limits

__all__ = ["MIN_GAIN", "GpuLost", "Outcome", "Trial", "chosen_table", "tune"]

MIN_GAIN = 0.03  # of the default's time


class GpuLost(RuntimeError):
    """The GPU does not answer any more, so nothing after can be believed."""


@dataclass(frozen=True)
class Trial:
    """One option against the default, both timed in the same rounds; or why it cannot win."""

    option: str
    seconds: float | None = None
    default_seconds: float | None = None
    fault: str | None = None

    @property
    def gain(self) -> float | None:
        """Share of the default's time that is saved; negative if it is slower."""
        if self.seconds is None or self.default_seconds is None:
            return None
        return 1 - self.seconds / self.default_seconds


@dataclass(frozen=True)
class Outcome:
    """What became of one choice at one shape; `fault`: why the default itself could not run."""

    choice: str
    shape: str
    title: str
    default: str
    trials: tuple[Trial, ...] = ()
    fault: str | None = None

    @property
    def winner(self) -> Trial | None:
        """The option that saves most, if that is enough."""
        best = max(self.trials, key=lambda trial: trial.gain or 0.0, default=None)
        return best if best is not None and (best.gain or 0.0) >= MIN_GAIN else None

    @property
    def chosen(self) -> str:
        """What kernels will take."""
        return self.default if self.winner is None else self.winner.option


def tune(
    subjects: Iterable[Subject], device: torch.device, stopwatch: Stopwatch
) -> Iterator[Outcome]:
    """Yields one outcome a subject, as each is done.

    Raises:
        GpuLost: a kernel left the GPU in a state in which nothing runs.
    """
    for subject in subjects:
        yield _tune_one(subject, device, stopwatch)


def chosen_table(outcomes: Iterable[Outcome]) -> Table:
    """What is worth storing: the options that won."""
    table: Table = {}
    for outcome in outcomes:
        if outcome.winner is not None:
            table.setdefault(outcome.choice, {})[outcome.shape] = outcome.chosen
    return table


def _tune_one(subject: Subject, device: torch.device, stopwatch: Stopwatch) -> Outcome:
    default, *others = CHOICES[subject.choice]
    found = Outcome(subject.choice, subject.shape, subject.title, default)
    try:
        tensors = subject.make(device)
        judge = _Judge(subject, subject.truth(tensors), subject.baseline(tensors))
        fault = judge.fault_of(default, tensors)
    except Exception as error:  # most often too little memory: this shape is not for this GPU
        fault = _said(error, device)
    if fault is not None:
        return Outcome(**vars(found) | {"fault": fault})
    trials = [_try(judge, option, tensors, stopwatch, device) for option in others]
    return Outcome(**vars(found) | {"trials": tuple(trials)})


class _Judge(NamedTuple):
    """Knows what a subject's results have to be."""

    subject: Subject
    truth: Tensors
    baseline: Tensors

    def fault_of(self, option: str, tensors: Tensors) -> str | None:
        """What `option` does that it must not, if anything. Raises what it raises."""
        memory = GuardedMemory()
        with override({self.subject.choice: option}), memory:
            results = self.subject.run(tensors)
        if not memory.is_untouched():
            return "wrote outside a buffer"
        for name, exact in self.truth.items():
            fault = self._difference(name, results[name], exact)
            if fault is not None:
                return fault
        return None

    def _difference(self, name: str, got: Tensor, exact: Tensor) -> str | None:
        if got.shape != exact.shape:
            return f"{name} has shape {list(got.shape)}, expected {list(exact.shape)}"
        if not bool(torch.isfinite(got).all()):
            return f"{name} holds NaN or infinity"
        dtype = self.subject.dtype
        for error, limit in errors_and_limits(got, exact, self.baseline[name], dtype):
            if not error <= limit:
                return f"{name} is wrong: error {error:.1e}, allowed {limit:.1e}"
        return None


def _try(
    judge: _Judge, option: str, tensors: Tensors, stopwatch: Stopwatch, device: torch.device
) -> Trial:
    try:
        fault = judge.fault_of(option, tensors)
        if fault is not None:
            return Trial(option, fault=fault)
        default = CHOICES[judge.subject.choice][0]
        runs = [_under(judge.subject, name, tensors) for name in (default, option)]
        default_seconds, seconds = stopwatch.medians(runs)
    except Exception as error:  # whatever a kernel or its compiler raises: the next option runs
        return Trial(option, fault=_said(error, device))
    return Trial(option, seconds, default_seconds)


def _under(subject: Subject, option: str, tensors: Tensors) -> Callable[[], object]:
    def run() -> object:
        with override({subject.choice: option}):
            return subject.run(tensors)

    return run


def _said(error: Exception, device: torch.device) -> str:
    """The first line of an error, once it is sure that the GPU still works."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except Exception as fatal:
            raise GpuLost(f"{type(error).__name__}: {error}") from fatal
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {first_line}"[:200]
