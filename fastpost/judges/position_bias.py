"""What the order of two answers does to a judge's verdicts.

Each pair is asked in both orders; a_i, b_i ∈ {0, ½, 1} say how far the answer that stood first won
in either. A judge that sees the answers alone has a_i + b_i = 1 in every row.

    bias = mean((a_i + b_i) / 2) − ½          in [−½, ½]; above 0 the first place is favoured

Source: Zheng 2023, arXiv:2306.05685, section 3.3 (the bias, and swapping against it).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PositionBias", "position_bias"]

_SIGNIFICANT = 2.0  # standard errors


@dataclass(frozen=True)
class PositionBias:
    """Position bias over pairs with both verdicts.

    Attributes:
        pairs: how many.
        bias: as above; NaN without a pair.
        standard_error: of the bias; NaN for fewer than two pairs.
        consistent: share of pairs whose verdict did not change with the order.
    """

    pairs: int
    bias: float
    standard_error: float
    consistent: float

    @property
    def is_biased(self) -> bool:
        """The bias is more than two standard errors away from 0."""
        return abs(self.bias) > _SIGNIFICANT * self.standard_error

    def __str__(self) -> str:
        if not self.pairs:
            return "no pair with both verdicts"
        side = "first" if self.bias > 0 else "second"
        text = f"{self.consistent:.0%} of {self.pairs} pairs judged alike in both orders"
        if self.bias:
            text += f"; the {side} place favoured by {abs(self.bias):.1%}"
            text += f" ± {self.standard_error:.1%}" if self.pairs > 1 else ""
        return text


def position_bias(verdicts: Sequence[tuple[float | None, float | None]]) -> PositionBias:
    """Of (how far the first place won, and again with the answers swapped), None where missing."""
    both = [(a, b) for a, b in verdicts if a is not None and b is not None]
    if not both:
        return PositionBias(0, math.nan, math.nan, math.nan)
    first = [(a + b) / 2 for a, b in both]
    error = statistics.stdev(first) / math.sqrt(len(first)) if len(first) > 1 else math.nan
    consistent = sum(a + b == 1 for a, b in both) / len(both)
    return PositionBias(len(both), statistics.fmean(first) - 0.5, error, consistent)
