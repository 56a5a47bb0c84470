"""Time against memory, one panel per case: who is beaten in both, and who is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

__all__ = ["front", "plot"]

_COLUMNS = 3


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in one coordinate without losing in the other, sorted."""
    best: list[tuple[float, float]] = []
    for time, memory in sorted(set(points)):
        if not best or memory < best[-1][1]:
            best.append((time, memory))
    return best


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Writes a PNG of the timed rows: ours round, peers square, the front as a line.

    A floor is a dashed line: its memory is not a result."""
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "timed":
            cases.setdefault((row["op"], row["shape"]), []).append(row)
    columns = max(1, min(_COLUMNS, len(cases)))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(5.4 * columns, 4.2 * max(1, lines)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for place, (case, members) in enumerate(cases.items(), 1):
        _panel(figure.add_subplot(lines, columns, place), case, members)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, case: tuple[str, str], members: list[dict[str, Any]]) -> None:
    axes.set_title(f"{case[0]}, {case[1]}", fontsize=9)
    axes.set_xlabel("ms, forward and backward")
    axes.set_ylabel("peak MB beyond inputs")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    rivals = [row for row in members if "error" in row]
    for row in members:
        if "error" not in row:
            axes.axvline(row["median_ms"], linestyle="--", color="grey", linewidth=1)
            label = axes.get_xaxis_transform()
            axes.text(row["median_ms"], 0.02, f" {row['implementation']}", fontsize=7,
                      rotation=90, color="grey", transform=label)  # fmt: skip
    best = front([_point(row) for row in rivals])
    axes.plot(*zip(*best, strict=True), color="black", linewidth=0.8, drawstyle="steps-post")
    for place, row in enumerate(rivals):
        ours = row["implementation"].startswith("fastpost")
        axes.plot(*_point(row), "o" if ours else "s", color=f"C{place % 10}",
                  label=row["implementation"])  # fmt: skip
    axes.margins(0.15)
    axes.legend(fontsize=7)


def _point(row: dict[str, Any]) -> tuple[float, float]:
    return row["median_ms"], max(row["peak_extra_mb"], 0.1)
