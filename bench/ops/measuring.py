"""Numerics, time, peak memory and FLOPs of contenders.

A contender is checked before it is timed, on memory that reads as NaN where it was not written;
one that is wrong gets a row without a time. Rounds go through all contenders in turn, so that a
busy machine slows all of them alike.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.ops.contender import Case, Contender, Results
from fastpost_kernels._kept_buffer import release_kept_buffers
from fastpost_kernels.testing import errors_and_limits

__all__ = [
    "CLOCKS",
    "Check",
    "Clock",
    "EventClock",
    "HostClock",
    "check",
    "choose_clock",
    "measure",
    "peak_bytes",
]

CLOCKS = ("wall", "cpu", "events")
# Wrong is what is this many times worse than our own tests allow: peers round results that we keep
# in fp32, such as the loss.
_SLACK = 4


def _addmm_flops(acc: torch.Size, a: torch.Size, b: torch.Size, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


_COUNTED_TOO = {
    torch.ops.aten.addmm_: _addmm_flops
}  # torch's counter has not the in-place spelling


class Clock(Protocol):
    def milliseconds(self, run: Callable[[], Any]) -> float: ...


class HostClock:
    """A counter of seconds of this process, for work that has ended when a call returns."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self.seconds = seconds

    def milliseconds(self, run: Callable[[], Any]) -> float:
        start = self.seconds()
        run()
        return 1e3 * (self.seconds() - start)


class EventClock:
    """Between two events on the GPU's stream; `cuda` is `torch.cuda`, or stands in for it."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda

    def milliseconds(self, run: Callable[[], Any]) -> float:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        start.record()
        run()
        end.record()
        self.cuda.synchronize()
        return float(start.elapsed_time(end))


def choose_clock(name: str | None, device: torch.device) -> tuple[str, Clock]:
    """Its name and the clock; None takes events on GPUs and the wall clock elsewhere.

    Raises ValueError for a clock that cannot time work on `device`.
    """
    is_gpu = device.type == "cuda"
    name = name or ("events" if is_gpu else "wall")
    if (name == "events") != is_gpu:
        raise ValueError(
            f"clock {name!r} cannot time work on {device}: take events on GPUs, wall or cpu on CPUs"
        )
    clocks: dict[str, Clock] = {
        "wall": HostClock(time.perf_counter),
        # with one thread: work instead of time, which does not mind other processes
        "cpu": HostClock(time.process_time),
    }
    return name, EventClock() if is_gpu else clocks[name]


class Check(NamedTuple):
    """The result that came closest to its limit, or passed it; and what the run multiplied."""

    result: str
    error: float  # relative to the truth's largest element or root mean square
    limit: float
    flops: int

    @property
    def is_wrong(self) -> bool:
        return not self.error <= self.limit  # NaN is wrong


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns_only)


def check(contender: Contender, case: Case, truth: Results, baseline: Results) -> Check:
    """One run in poisoned memory against `truth`."""
    release_kept_buffers()
    counter = FlopCounterMode(display=False, custom_mapping=_COUNTED_TOO)
    with poisoned_memory(), counter:
        found = contender.run()
    flops = counter.get_total_flops()
    if contender.is_floor:
        return Check("", 0.0, 0.0, flops)
    if contender.unpack is not None:
        found = contender.unpack(found)
    if found.keys() != truth.keys():
        raise ValueError(
            f"{contender.name} returned {sorted(found)}, the truth of {case.op} is {sorted(truth)}"
        )
    checks = []
    for name, exact in truth.items():
        if found[name].shape != exact.shape:
            checks.append(Check(f"shape of {name}", float("inf"), 0.0, flops))
            continue
        pairs = errors_and_limits(found[name], exact, baseline[name], case.dtype)
        checks += [Check(name, error, _SLACK * limit, flops) for error, limit in pairs]
    # first the wrong ones, NaN among them; then by how much of the limit is used
    return max(checks, key=lambda c: (c.is_wrong, c.error / c.limit if c.limit else 0.0))


def peak_bytes(run: Callable[[], Any], device: torch.device | None = None) -> int:
    """Largest amount of memory that torch's allocator held during `run`, above its start.

    A buffer kept from an earlier call would not show up as an allocation: it is released first.
    """
    release_kept_buffers()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def measure(case: Case, clock: Clock, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row per contender: what was checked, and unless it failed the median time and peak."""
    truth, baseline = case.truth(), case.baseline()
    rows, checked = [], []
    for contender in case.contenders:
        row: dict[str, Any] = {
            "op": case.op, "shape": case.shape, "implementation": contender.name, "status": "timed"
        }  # fmt: skip
        rows.append(row)
        if contender.gpu_only and device.type != "cuda":
            row["status"] = "GPU only"
            continue
        try:
            verdict = check(contender, case, truth, baseline)
        except ImportError as missing:
            row["status"] = f"not installed: {missing.name}"
            continue
        if not contender.is_floor:
            row |= {"error": verdict.error, "error_limit": verdict.limit}
        if verdict.flops:  # an op without a formula counts nothing
            row["gflop"] = round(verdict.flops / 1e9, 3)
        if verdict.is_wrong:
            row["status"] = f"wrong: {verdict.result}"
            continue
        row["peak_extra_mb"] = round(peak_bytes(contender.run, device) / 1e6, 1)
        checked.append((contender, row))
    del truth, baseline
    _time(checked, clock, rounds)
    return rows


def _time(checked: list[tuple[Contender, dict[str, Any]]], clock: Clock, rounds: int) -> None:
    times: list[list[float]] = [[] for _ in checked]
    for _ in range(rounds):
        for taken, (contender, _) in zip(times, checked, strict=True):
            taken.append(clock.milliseconds(contender.run))
    medians = [statistics.median(taken) for taken in times]
    floors = [m for m, (c, _) in zip(medians, checked, strict=True) if c.is_floor]
    for median, (_, row) in zip(medians, checked, strict=True):
        row["median_ms"] = round(median, 3)
        if floors:
            row["over_floor"] = round(median / floors[0], 3)
