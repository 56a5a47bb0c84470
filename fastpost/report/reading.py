"""A run's folder as the report needs it: of a pipeline, or of one training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RECORD", "NoRun", "RunRead", "StageRead", "read_run", "read_training"]

RECORD = "fastpost_record.jsonl"


class NoRun(ValueError):
    """A folder that holds no run to report on."""


@dataclass
class StageRead:
    """One training or other stage.

    Attributes:
        name: of the stage.
        kind: of the stage; of a plain training its command.
        seconds: it took; None where nobody counted.
        curves: name of a metric -> its (step, value) points.
        trial: predicted and measured bytes of the trial step.
        health: findings, each with monitor, step, illness, figures, fix, action.
        scores: name -> value, low, high, n of the evaluation after it.
        samples: prompt, reply, score of that evaluation.
        finished: whether it is done.
        bytes: on disk of what it made.
        tokens: trained on, None if unknown.
        inputs: digests of what it read.
    """

    name: str
    kind: str
    seconds: float | None = None
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    trial: dict[str, Any] | None = None
    health: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    bytes: int | None = None
    tokens: float | None = None
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass
class RunRead:
    """A run.

    Attributes:
        name: of the run, its folder's path.
        stages: in order, `start` (an evaluation alone) first where there is one.
        facts: of its last start (`fastpost.pipeline.run_facts`); empty for a plain training.
        planned: name of a training -> its plan, from `--plan`.
        starts: how often it was started.
    """

    name: str
    stages: list[StageRead]
    facts: dict[str, Any] = field(default_factory=dict)
    planned: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: int = 1


def read_run(folder: str | Path) -> RunRead:
    """The run in a folder.

    Raises:
        NoRun: neither a pipeline's manifest nor a training's record is there.
    """
    folder = Path(folder).expanduser()
    manifest = _json(folder / "manifest.json")
    if manifest is None:
        if not (folder / RECORD).is_file():
            raise NoRun(
                f"{folder} holds no run: neither manifest.json of `fastpost run` nor {RECORD} of a "
                "training with `record: true`"
            )
        stage = StageRead(folder.name, "training")
        read_training(folder / RECORD, stage)
        return RunRead(str(folder), [stage])
    facts = manifest["starts"][-1]
    names = [stage["name"] for stage in facts["pipeline"]["stages"]]
    stages = []
    for name in ["start", *names]:
        found = _stage(folder / "stages" / name, name, facts)
        if found is not None:
            stages += [found, *_trainings(folder / "stages" / name / "loop", name)]
    plans = _json(folder / "plan.json") or []
    planned = {plan["name"]: plan for plan in plans}
    return RunRead(str(folder), stages, facts, planned, len(manifest["starts"]))


def _stage(folder: Path, name: str, facts: dict[str, Any]) -> StageRead | None:
    record, evaluation = _json(folder / "stage.json"), _json(folder / "evaluation.json")
    kinds = {stage["name"]: stage["kind"] for stage in facts["pipeline"]["stages"]}
    stage = StageRead(name, kinds.get(name, "evaluation"))
    if record is not None:
        stage.seconds, stage.finished = record["seconds"], record["finished"]
        stage.bytes, stage.inputs = record.get("bytes"), record["inputs"]
    elif evaluation is None:
        return None
    # Merged models have the files of their base beside their weights, its record among them.
    if stage.kind not in ("merge", "export") and (folder / "model" / RECORD).is_file():
        read_training(folder / "model" / RECORD, stage)
    if evaluation is not None:
        stage.scores, stage.samples = evaluation["scores"], evaluation["samples"]
        stage.skipped = evaluation["skipped"]
        stage.finished = stage.finished or record is None
    return stage


def _trainings(folder: Path, loop: str) -> list[StageRead]:
    """The trainings inside a loop, whose time is the loop's."""
    found = []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        stage = StageRead(f"{loop}/{path.parent.name}", "training", finished=True)
        read_training(path, stage)
        stage.seconds = None
        found.append(stage)
    return found


def read_training(path: Path, stage: StageRead) -> None:
    """A training's record into `stage`; what a kill undid is left out."""
    seconds_before, tokens_before = 0.0, 0.0
    logs: list[dict[str, Any]] = []
    health: list[dict[str, Any]] = []
    spent = 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line that a kill cut off
        event = entry["event"]
        if event == "begin":
            logs = [log for log in logs if log["step"] <= entry["step"]]
            health = [found for found in health if found["step"] <= entry["step"]]
            seconds_before = spent
            tokens_before = max((log["tokens"] for log in logs), default=0.0)
            if stage.kind == "training":
                stage.kind = entry["method"]
        elif event == "trial":
            stage.trial = entry
        elif event == "log":
            spent = seconds_before + entry["seconds"]
            logs.append({**entry, "tokens": tokens_before + entry["tokens"], "seconds": spent})
        elif event == "health":
            health.append(entry)
        elif event == "end":
            spent = seconds_before + entry["seconds"]
            stage.finished = True
    stage.health = health
    stage.seconds = spent if stage.seconds is None else stage.seconds
    stage.tokens = logs[-1]["tokens"] if logs else None
    before = {"seconds": 0.0, "tokens": 0.0}
    for log in logs:
        step = float(log["step"])
        if "train_runtime" in log["logs"]:
            continue  # what transformers says at the end, at the last step once more
        for name, value in log["logs"].items():
            if not name.startswith(("train_", "total_flos", "epoch")):
                stage.curves.setdefault(name, []).append((step, value))
        stage.curves.setdefault("peak memory, GiB", []).append((step, log["peak"] / 2**30))
        passed = log["seconds"] - before["seconds"]
        if log["tokens"] > before["tokens"] and passed > 0:
            speed = (log["tokens"] - before["tokens"]) / passed
            stage.curves.setdefault("tokens/s", []).append((step, speed))
        before = log


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
