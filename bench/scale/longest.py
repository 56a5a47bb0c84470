"""The longest row that fits on a GPU, found by tracing.

Memory grows nearly linearly with the length of the one row a GPU computes. The line through two
traced lengths says where it meets what the GPU has; that length is traced, and becomes one of the
two, until it fits with less than 3 % to spare. What is returned has itself been traced and fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.scale.sides import peak_of_step
from fastpost.planning.trace import Traced

__all__ = ["Longest", "longest_that_fits"]

STEP = 256  # lengths are multiples of it
_TRACES = 6
_SPARE = 0.03
_BEYOND = 4_000_000  # no longer row is looked for


@dataclass(frozen=True)
class Longest:
    """`tokens` of a row, 0 where none fits, and the peak in bytes there."""

    tokens: int
    peak_bytes: int


def longest_that_fits(
    run: Callable[[int], Traced], usable: int, start: tuple[int, int] = (4096, 16384)
) -> Longest:
    """The longest row whose step `run(tokens)` fits in `usable` bytes."""
    peaks = {tokens: peak_of_step(run(tokens)).total for tokens in start}
    while len(peaks) < _TRACES:
        best = max((t for t, peak in peaks.items() if peak <= usable), default=0)
        if best and usable - peaks[best] < _SPARE * usable:
            break
        over = min((t for t, peak in peaks.items() if peak > usable), default=_BEYOND)
        tokens = _meets(peaks, usable) // STEP * STEP
        if not best < tokens < over:
            tokens = (best + min(over, 2 * max(best, STEP))) // 2 // STEP * STEP
        if tokens <= best or tokens in peaks:
            break
        peaks[tokens] = peak_of_step(run(tokens)).total
    best = max((t for t, peak in peaks.items() if peak <= usable), default=0)
    return Longest(best, peaks.get(best, min(peaks.values())))


def _meets(peaks: dict[int, int], usable: int) -> int:
    """Where the line through the two lengths nearest to `usable` meets it."""
    near = sorted(peaks, key=lambda tokens: abs(peaks[tokens] - usable))[:2]
    first, second = sorted(near)
    slope = (peaks[second] - peaks[first]) / (second - first)
    if slope <= 0:
        return 2 * second
    return int(second + (usable - peaks[second]) / slope)
