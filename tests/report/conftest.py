"""The files of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpost.report.reading import RECORD

FINDING = {
    "event": "health", "monitor": "length", "step": 3, "illness": "answers grow <fast>",
    "figures": "mean 400, was 100", "fix": "a lower beta", "action": "warn",
}  # fmt: skip


def log(step: int, **logs: float) -> dict[str, Any]:
    return {
        "event": "log", "step": step, "seconds": 2.0 * step, "tokens": 100 * step,
        "peak": step * 2**30, "logs": logs,
    }  # fmt: skip


def begin(step: int) -> dict[str, Any]:
    return {"event": "begin", "step": step, "time": 0, "max_steps": 4, "method": "dpo"}


def write(path: Path, *entries: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def evaluation(value: float, reply: str) -> dict[str, Any]:
    score = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 8, "tolerance": 0.05}
    prompt = [{"role": "user", "content": "What is <b>2 + 2</b>?"}]
    sample = {"scorer": "exam", "prompt": prompt, "reply": reply, "score": value}
    return {"scores": {"exam": score}, "samples": [sample], "skipped": {"mmlu": "not installed"}}


def make_run(folder: Path) -> Path:
    """A finished pipeline's folder, with two stages, an exam before and after, and a finding."""
    stages = [{"name": "dpo", "kind": "dpo"}, {"name": "merged", "kind": "merge"}]
    facts = {
        "pipeline": {"stages": stages},
        "machine": {"gpus": ["NVIDIA H100", "NVIDIA H100"]},
        "versions": {"torch": "9.9"},
    }
    dump(folder / "manifest.json", {"starts": [facts, facts]})
    for name, kind in (("dpo", "dpo"), ("merged", "merge")):
        record = {"stage": name, "kind": kind, "seconds": 90.0, "finished": True, "inputs": {}}
        dump(folder / f"stages/{name}/stage.json", {**record, "bytes": 5_000_000})
    write(
        folder / "stages/dpo/model" / RECORD,
        begin(0),
        {"event": "trial", "predicted": 3 * 2**30, "measured": 4 * 2**30, "reason": ""},
        log(1, loss=0.7, **{"rewards/margins": -0.1, "kl": 0.0, "entropy": 2.0}),
        log(2, loss=0.6, **{"rewards/margins": 0.2, "kl": 0.1, "entropy": 1.5}),
        FINDING,
        {"event": "end", "step": 2, "seconds": 5.0},
    )
    dump(folder / "stages/start/evaluation.json", evaluation(0.6, "five"))
    dump(folder / "stages/dpo/evaluation.json", evaluation(0.5, "four & more"))
    prediction = {"gpu_hours": 12.0, "dollars": 36.0}
    plan = {"name": "dpo", "prediction": prediction, "predicted_peak_bytes": 7 * 2**30}
    dump(folder / "plan.json", [plan])
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")
