"""The history of a run as a picture: one panel a measure, a line where something was found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpost.health.finding import Finding
from fastpost.health.reading import Reading

_PANELS = (
    "reward",
    "reward_std",
    "zero_std_share",
    "kl",
    "sequence_kl",
    "entropy",
    "mean_length",
    "truncated_share",
    "loss",
    "grad_norm",
)
_COLUMNS = 2
_INCHES = (5.0, 2.2)  # of one panel


def plot_history(
    readings: Sequence[Reading],
    findings: Sequence[Finding],
    path: str | os.PathLike[str],
    also: Sequence[str] = (),
) -> Path:
    """Write a PNG (or whatever the path's suffix says).

    Args:
        readings: the history.
        findings: drawn as vertical lines, red where they stopped the run.
        path: file to write; its folder is made.
        also: further measures to draw, such as held-out rewards.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no reading holds any of the measures.
    """
    try:
        # Heavy, and needed by nobody who does not plot.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot needs matplotlib; run: python -m pip install 'fastpost[demo]'"
        ) from error
    names = [
        name for name in (*_PANELS, *also) if any(name in reading.values for reading in readings)
    ]
    if not names:
        raise ValueError("nothing to plot: no log with a reward, entropy, length or loss was seen")
    rows = -(-len(names) // _COLUMNS)
    figure = Figure(figsize=(_COLUMNS * _INCHES[0], rows * _INCHES[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        _draw(axis, name, readings, findings)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw(axis: Any, name: str, readings: Sequence[Reading], findings: Sequence[Finding]) -> None:
    points = [(r.step, r.values[name]) for r in readings if name in r.values]
    axis.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 50 else "")
    for finding in findings:
        color = "tab:red" if finding.action == "stop" else "tab:orange"
        axis.axvline(finding.step, color=color, linewidth=0.8, alpha=0.6)
    axis.set_title(name, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.2)


__all__ = ["plot_history"]
