"""The beginning and the present of one noisy number."""

from __future__ import annotations

import math
from collections import deque


class Series:
    """Means over the first and the last `window` values, and how far chance moves such a mean.

    Memory is bounded by the window. The noise of a single value is taken from differences of
    neighbours (von Neumann 1941: σ² = Σ (x_t − x_{t−1})² / 2(n − 1)), which a slow drift, the thing
    looked for, does not inflate.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 reading, got {window}")
        self.window = window
        self.count = 0
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=window)
        self._sum_sq_steps = 0.0

    def add(self, value: float) -> None:
        if self._last:
            self._sum_sq_steps += (value - self._last[-1]) ** 2
        if len(self._first) < self.window:
            self._first.append(value)
        self._last.append(value)
        self.count += 1

    @property
    def is_full(self) -> bool:
        """Whether `recent` is a mean over a whole window."""
        return self.count >= self.window

    @property
    def has_moved_on(self) -> bool:
        """Whether `recent` shares no value with `start`."""
        return self.count >= 2 * self.window

    @property
    def start(self) -> float:
        return sum(self._first) / len(self._first)

    @property
    def recent(self) -> float:
        return sum(self._last) / len(self._last)

    @property
    def noise(self) -> float:
        """Standard deviation, by chance alone, of the difference between two window means."""
        if self.count < 2:
            return 0.0
        of_one = math.sqrt(self._sum_sq_steps / (2 * (self.count - 1)))
        return of_one * math.sqrt(2 / self.window)


__all__ = ["Series"]
