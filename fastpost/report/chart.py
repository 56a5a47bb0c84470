"""A line chart as inline SVG: readable without a script, in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

__all__ = ["COLOURS", "chart"]

COLOURS = 6
Series = tuple[str, Sequence[tuple[float, float]]]

_WIDTH, _HEIGHT = 320.0, 170.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 8.0, 8.0, 22.0
_MOST_POINTS = 400


def chart(title: str, series: Sequence[Series]) -> str:
    """One figure; `series` are (label, points), the first in the first colour.

    Points that are no finite numbers are left out, and their number is said. Long series are drawn
    as their means over equal stretches.
    """
    finite = [
        (label, [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
        for label, points in series
    ]
    left_out = sum(len(p) for _, p in series) - sum(len(p) for _, p in finite)
    drawn = [(label, _thinned(points)) for label, points in finite]
    every = [point for _, points in drawn for point in points]
    note = f", {left_out} points are not finite" if left_out else ""
    if not every:
        return f"<figure><figcaption>{escape(title)}: no finite points{note}</figcaption></figure>"
    x_low, x_high = _range([x for x, _ in every])
    y_low, y_high = _range([y for _, y in every])

    def at(x: float, y: float) -> tuple[float, float]:
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        across = _LEFT + (x - x_low) / (x_high - x_low) * width
        return across, _TOP + (y_high - y) / (y_high - y_low) * height

    parts = [
        f'<figure><svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    parts += _axes(x_low, x_high, y_low, y_high, at)
    for number, (_, points) in enumerate(drawn):
        colour = f"c{number % COLOURS}"
        places = [at(x, y) for x, y in points]
        if len(places) == 1:
            parts.append(
                f'<circle class="{colour}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
            )
        elif places:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line {colour}" points="{path}"/>')
    parts.append(f"</svg><figcaption>{escape(title)}{note}{_ends(drawn)}</figcaption></figure>")
    return "".join(parts)


def _axes(x_low: float, x_high: float, y_low: float, y_high: float, at: object) -> list[str]:
    assert callable(at)
    parts = []
    for y in (y_low, (y_low + y_high) / 2, y_high):
        height = at(x_low, y)[1]
        parts.append(
            f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" '
            f'y2="{height:.1f}"/><text x="{_LEFT - 4}" y="{height + 4:.1f}" '
            f'text-anchor="end">{_short(y)}</text>'
        )
    if y_low < 0 < y_high:
        height = at(x_low, 0)[1]
        parts.append(
            f'<line class="zero" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" '
            f'y2="{height:.1f}"/>'
        )
    for x, anchor in ((x_low, "start"), (x_high, "end")):
        parts.append(
            f'<text x="{at(x, y_low)[0]:.1f}" y="{_HEIGHT - 6}" '
            f'text-anchor="{anchor}">{_short(x)}</text>'
        )
    return parts


def _ends(drawn: Sequence[Series]) -> str:
    """Where each line begins and ends, in its colour: what the eye cannot read off."""
    said = []
    for number, (label, points) in enumerate(drawn):
        if points:
            name = f"{escape(label)} " if label else ""
            said.append(
                f'<br><span class="c{number % COLOURS}">●</span> {name}'
                f"{_short(points[0][1])} → {_short(points[-1][1])}"
            )
    return "".join(said)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / _MOST_POINTS)
    means = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        means.append((part[-1][0], sum(y for _, y in part) / len(part)))
    return means


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest, apart from each other."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.05 or 0.5
        return low - pad, high + pad
    return low, high


def _short(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}"
    if abs(value) < 1:
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
