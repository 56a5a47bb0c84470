"""How long several ways to do one thing take on a GPU, measured in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

__all__ = ["CudaStopwatch", "Stopwatch"]

WARM_UP, ROUNDS = 3, 15
# Written between two measurements, so that each finds the L2 cache as a training step would.
FLUSHED_BYTES = 256 << 20


class Stopwatch(Protocol):
    """What the tuner asks; tests bring their own."""

    def medians(self, runs: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds that each of `runs` takes, in their order."""
        ...


class CudaStopwatch:
    """CUDA events around every run. One round runs everything once, so that a GPU whose clock
    changes slows all alike; the first rounds, which compile, do not count."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def medians(self, runs: Sequence[Callable[[], object]]) -> list[float]:
        """See `Stopwatch.medians`. Raises what a run raises."""
        spans: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
        with torch.cuda.device(self.device):
            for number in range(WARM_UP + ROUNDS):
                for run, found in zip(runs, spans, strict=True):
                    self.flushed.zero_()
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    run()
                    end.record()
                    if number >= WARM_UP:
                        found.append((start, end))
            torch.cuda.synchronize(self.device)
        return [
            statistics.median(start.elapsed_time(end) for start, end in found) / 1e3
            for found in spans
        ]
