"""The page: HTML with its style and charts inside, no script, nothing that is fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from fastpost.report.chart import COLOURS, chart
from fastpost.report.reading import RunRead, StageRead

__all__ = ["page_of"]

GIB = 2**30
# What is charted first, by the names trainers log; all else goes under "more".
_FIRST = (
    "loss", "eval_loss", "mean_token_accuracy", "reward", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "rewards/accuracies", "kl", "objective/kl", "entropy",
    "completions/mean_length", "learning_rate", "grad_norm", "tokens/s", "peak memory, GiB",
)  # fmt: skip


def page_of(runs: Sequence[RunRead]) -> str:
    """The whole page; several runs are overlaid stage by stage, each in a colour of its own."""
    style = resources.files("fastpost.report").joinpath("page.css").read_text(encoding="utf-8")
    title = " and ".join(run.name for run in runs)
    body = [f"<h1>{escape(title)}</h1>", _legend(runs)]
    body += [_summary(run, len(runs) > 1) for run in runs]
    body += [_evaluations(runs), _health(runs), _curves(runs), _memory(runs), _samples(runs)]
    body += [_facts(run, len(runs) > 1) for run in runs]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _legend(runs: Sequence[RunRead]) -> str:
    if len(runs) == 1:
        return ""
    names = [
        f'<span class="c{number % COLOURS}">●</span> {escape(run.name)}'
        for number, run in enumerate(runs)
    ]
    return f"<p>{' &nbsp; '.join(names)}</p>"


def _title(text: str, run: RunRead, several: bool) -> str:
    return f"<h2>{escape(text)}{f': {escape(run.name)}' if several else ''}</h2>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; `numbers` are the columns set to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if i in numbers else ''}>{cell}</{tag}>"
            for i, cell in enumerate(row)
        )

    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _summary(run: RunRead, several: bool) -> str:
    """What each stage took, predicted beside."""
    rows = []
    for stage in run.stages:
        state = "done" if stage.finished else '<span class="worse">not finished</span>'
        planned = (run.planned.get(stage.name) or {}).get("prediction")
        predicted = "-"
        if planned and planned["gpu_hours"] is not None:
            predicted = f"{planned['gpu_hours']:,.1f} GPU h, ${planned['dollars']:,.0f}"
        rows.append(
            [
                escape(stage.name),
                escape(stage.kind),
                state,
                _duration(stage.seconds),
                "-" if stage.tokens is None else f"{stage.tokens:,.0f}",
                "-" if stage.bytes is None else f"{stage.bytes / 10**6:,.1f} MB",
                predicted,
            ]
        )
    seconds = [stage.seconds for stage in run.stages if stage.seconds is not None]
    gpus = run.facts.get("machine", {}).get("gpus", [])
    where = f"{len(gpus)} x {gpus[0]}" if gpus else "a CPU"
    cost = f"{_duration(sum(seconds))} in all on {escape(where)}" if seconds else ""
    if gpus and seconds:
        cost += f", {sum(seconds) * len(gpus) / 3600:,.1f} GPU hours"
    started = f"started {run.starts} times" if run.starts > 1 else ""
    head = ["stage", "kind", "state", "took", "tokens", "made", "predicted by --plan"]
    return (
        _title("Stages and cost", run, several)
        + _table(head, rows, (3, 4, 5, 6))
        + f'<p class="soft">{"; ".join(part for part in (cost, started) if part)}</p>'
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _evaluations(runs: Sequence[RunRead]) -> str:
    parts = []
    for run in runs:
        names = list(dict.fromkeys(name for stage in run.stages for name in stage.scores))
        if not names:
            continue
        best: dict[str, float] = {}
        rows = []
        for stage in run.stages:
            if not stage.scores:
                continue
            row = [escape(stage.name)]
            for name in names:
                row.append(_score(stage.scores.get(name), best.get(name)))
                if name in stage.scores:
                    value = stage.scores[name]["value"]
                    best[name] = max(value, best.get(name, value))
            rows.append(row)
        parts.append(_title("Evaluation", run, len(runs) > 1))
        parts.append(_table(["after", *map(escape, names)], rows, range(1, len(names) + 1)))
        skipped = {name: why for stage in run.stages for name, why in stage.skipped.items()}
        parts += [f"<p>{escape(name)} skipped: {escape(why)}</p>" for name, why in skipped.items()]
    note = '<p class="soft">95 % intervals; red: below the best before by more than allowed</p>'
    return "".join(parts) + note if parts else ""


def _score(score: dict[str, float] | None, best: float | None) -> str:
    if score is None:
        return "-"
    fallen = best is not None and best - score["value"] > score["tolerance"]
    kind = ' class="worse"' if fallen else ""
    return (
        f"<span{kind}>{score['value']:.3f}</span> "
        f'<span class="soft">[{score["low"]:.3f}, {score["high"]:.3f}] n={score["n"]:.0f}</span>'
    )


def _health(runs: Sequence[RunRead]) -> str:
    parts = ["<h2>Health</h2>"]
    for run in runs:
        for stage in run.stages:
            for found in stage.health:
                ending = " Training stopped." if found["action"] == "stop" else ""
                parts.append(
                    f'<div class="finding"><b>{escape(stage.name)}, step {found["step"]}: '
                    f"{escape(found['illness'])}</b><br>Evidence: {escape(found['figures'])}<br>"
                    f"Try: {escape(found['fix'])}{ending}"
                    f'<br><span class="soft">{escape(found["monitor"])}, {escape(run.name)}</span>'
                    "</div>"
                )
    if len(parts) == 1:
        parts.append('<p class="fine">Nothing was found.</p>')
    return "".join(parts)


def _curves(runs: Sequence[RunRead]) -> str:
    """Charts of each stage, stages of one name overlaid."""
    names = list(dict.fromkeys(s.name for run in runs for s in run.stages if s.curves))
    parts = ["<h2>Curves</h2>"] if names else []
    for name in names:
        found = [(run, stage) for run in runs for stage in run.stages if stage.name == name]
        metrics = list(dict.fromkeys(metric for _, stage in found for metric in stage.curves))
        first = [metric for metric in _FIRST if metric in metrics]
        rest = sorted(set(metrics) - set(first))
        parts.append(f"<h3>{escape(name)} ({escape(found[0][1].kind)})</h3>")
        parts.append(f'<div class="charts">{_charts(runs, found, first)}</div>')
        if rest:
            parts.append(
                f"<details><summary>{len(rest)} more of {escape(name)}</summary>"
                f'<div class="charts">{_charts(runs, found, rest)}</div></details>'
            )
    return "".join(parts)


def _charts(
    runs: Sequence[RunRead], found: Sequence[tuple[RunRead, StageRead]], metrics: Sequence[str]
) -> str:
    drawn = []
    for metric in metrics:
        by_run = {run.name: stage.curves.get(metric, []) for run, stage in found}
        # A run without the stage keeps its colour.
        series = [(run.name if len(runs) > 1 else "", by_run.get(run.name, [])) for run in runs]
        drawn.append(chart(metric, series))
    return "".join(drawn)


def _memory(runs: Sequence[RunRead]) -> str:
    """Peaks that were predicted, by the trial step or by --plan, beside those measured."""
    rows = []
    for run in runs:
        for stage in run.stages:
            peak = stage.curves.get("peak memory, GiB")
            planned = (run.planned.get(stage.name) or {}).get("predicted_peak_bytes")
            if not peak and not planned:
                continue
            trial = stage.trial or {}
            rows.append(
                [
                    escape(f"{run.name} {stage.name}" if len(runs) > 1 else stage.name),
                    _gib(planned),
                    _gib(trial.get("predicted")),
                    _gib(trial.get("measured")),
                    f"{max(value for _, value in peak):.2f} GiB" if peak else "-",
                ]
            )
    if not rows:
        return ""
    head = ["stage", "--plan", "trial step, predicted", "trial step, measured", "whole run"]
    note = (
        "Of the trial step both are bytes of tensors on the worst batch. The whole run is what the "
        "GPU's allocator held at most, on a CPU the whole process with its libraries."
    )
    return (
        "<h2>Memory, predicted and measured</h2>"
        + _table(head, rows, (1, 2, 3, 4))
        + f'<p class="soft">{note}</p>'
    )


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f} GiB"


def _samples(runs: Sequence[RunRead]) -> str:
    """Replies to the same prompt, from the first model to the last, side by side."""
    by_prompt: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for run in runs:
        for stage in run.stages:
            for sample in stage.samples:
                label = f"{run.name}, {stage.name}" if len(runs) > 1 else stage.name
                text = "\n".join(f"{turn['content']}" for turn in sample["prompt"][-1:])
                by_prompt.setdefault(f"{sample['scorer']}: {text}", []).append((label, sample))
    if not by_prompt:
        return ""
    parts = ["<h2>Answers, before and after</h2>"]
    for prompt, answers in by_prompt.items():
        shown = "".join(
            f'<div><span class="soft">{escape(label)}, score {sample["score"]:.2f}</span>'
            f"<pre>{escape(sample['reply'] or '(nothing)')}</pre></div>"
            for label, sample in answers
        )
        is_open = " open" if len(parts) < 3 else ""
        parts.append(
            f"<details{is_open}><summary>{escape(prompt)}</summary>"
            f'<div class="samples">{shown}</div></details>'
        )
    return "".join(parts)


def _facts(run: RunRead, several: bool) -> str:
    if not run.facts:
        return ""
    inputs = {stage.name: stage.inputs for stage in run.stages if stage.inputs}
    text = json.dumps({**run.facts, "inputs": inputs}, indent=1, ensure_ascii=False)
    return (
        _title("What ran", run, several)
        + "<details><summary>versions, data, configuration, kernels, git state</summary>"
        + f"<pre>{escape(text)}</pre></details>"
    )
