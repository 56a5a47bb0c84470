"""The beginning and the present of one noisy number."""

from __future__ import annotations

import math
from collections import deque

_KNOWN_AFTER = 5


class Series:
    """Means over the first and the last `window` values, and how far chance moves such a mean.

    Memory is bounded by the window. The noise of a single value is taken from second differences,
    σ² = Σ (x_t − 2 x_{t−1} + x_{t−2})² / 6(n − 2), which a steady drift, the thing looked for, does
    not inflate.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 reading, got {window}")
        self.window = window
        self.count = 0
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=window)
        self._neighbours: deque[float] = deque(maxlen=2)
        self._sum_sq_bends = 0.0

    def add(self, value: float) -> None:
        if len(self._neighbours) == 2:
            earlier, last = self._neighbours
            self._sum_sq_bends += (value - 2 * last + earlier) ** 2
        self._neighbours.append(value)
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
        """Standard deviation, by chance alone, of the difference between two window means.

        Infinite before the fifth value: an estimate from one or two bends is chance itself.
        """
        if self.count < _KNOWN_AFTER:
            return math.inf
        of_one = math.sqrt(self._sum_sq_bends / (6 * (self.count - 2)))
        return of_one * math.sqrt(2 / self.window)


__all__ = ["Series"]
