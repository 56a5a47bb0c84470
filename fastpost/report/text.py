"""A run in words: one line a stage, the scores, what was found."""

from __future__ import annotations

from collections.abc import Sequence

from fastpost.report.reading import RunRead

__all__ = ["text_of"]


def text_of(runs: Sequence[RunRead]) -> str:
    """The runs one after the other."""
    return "\n\n".join(_run(run) for run in runs)


def _run(run: RunRead) -> str:
    lines = [run.name, f"{'stage':20}{'kind':16}{'seconds':>9}{'last loss':>11}  scores"]
    for stage in run.stages:
        seconds = "-" if stage.seconds is None else f"{stage.seconds:,.0f}"
        loss = f"{stage.curves['loss'][-1][1]:.4f}" if "loss" in stage.curves else "-"
        scores = ", ".join(
            f"{name} {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
            for name, score in stage.scores.items()
        )
        state = "" if stage.finished else "  (not finished)"
        lines.append(
            f"{stage.name:20}{stage.kind:16}{seconds:>9}{loss:>11}  {scores}{state}".rstrip()
        )
    for stage in run.stages:
        lines += [
            f"health, {stage.name}, step {found['step']}: {found['illness']}; {found['figures']}; "
            f"try: {found['fix']}"
            for found in stage.health
        ]
        lines += [f"skipped, {stage.name}, {name}: {why}" for name, why in stage.skipped.items()]
    return "\n".join(lines)
