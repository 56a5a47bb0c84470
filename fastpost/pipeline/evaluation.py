"""Scores of a model with their intervals, and when a fall of one stops a run.

Every score is a mean over problems, the higher the better. Its interval is Wilson's at 95 %
(Wilson 1927, JASA 22:209), with the mean in place of the share of successes: exact in form for
right-or-wrong scores, wider than needed for those in between (their variance is smaller).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Regression", "best_so_far", "regressions", "score", "table"]

_Z = 1.959964


class Regression(RuntimeError):
    """A stage made the model worse by more than the stated tolerance."""


def score(values: Sequence[float], tolerance: float) -> dict[str, float]:
    """The mean of `values`, each in [0, 1], as a score: `value`, `low`, `high`, `n`, `tolerance`.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("nothing was scored: every problem or verdict is missing")
    n = len(values)
    mean = math.fsum(values) / n
    spread = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    middle = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    return {
        "value": mean,
        "low": max(0.0, middle - spread),
        "high": min(1.0, middle + spread),
        "n": n,
        "tolerance": tolerance,
    }


def best_so_far(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """Score by name -> its highest value, and the stage that had it."""
    best: dict[str, tuple[float, str]] = {}
    for stage, found in scores.items():
        for name, value in found.items():
            if name not in best or value["value"] > best[name][0]:
                best[name] = (value["value"], stage)
    return best


def regressions(
    scores: Mapping[str, Mapping[str, Any]], best: Mapping[str, tuple[float, str]]
) -> list[str]:
    """One line for each score below the best one by more than its tolerance.

    The best of all stages before, not the last: many small falls would pass one by one.
    """
    return [
        f"{name} fell from {best[name][0]:.3f} (after {best[name][1]}) to {found['value']:.3f}, "
        f"by more than the tolerance of {found['tolerance']:g}"
        for name, found in scores.items()
        if name in best and best[name][0] - found["value"] > found["tolerance"]
    ]


def table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Stages down, scores across: value and interval."""
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    rows = [["after", *names]]
    for stage, found in scores.items():
        rows.append(
            [stage]
            + [
                f"{s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}]"
                if (s := found.get(name))
                else "-"
                for name in names
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
