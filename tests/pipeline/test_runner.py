"""Skipping, going on, starting over and stopping, with processes that only write a file."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpost.pipeline import runner
from fastpost.pipeline.recipe import RecipeError
from fastpost.pipeline.runner import Regression, Run, StageFailed
from tests.pipeline.conftest import read

WRITE = (
    "import os,sys,pathlib; out=pathlib.Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True);"
    "(out / 'weights.safetensors').write_text(sys.argv[2]); print('wrote')"
)


class NoChain:
    def __init__(self, folder: Path) -> None:
        pass

    def begin(self, model: str) -> None:
        pass

    def after(self, stage: Any, model: Path) -> None:
        pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages whose process was started."""
    made: list[str] = []

    def command(stage: Any, fields: dict[str, Any], folder: Path, gpus: str | None) -> list[str]:
        made.append(stage.name)
        if fields.get("run_name") == "fails":
            return [sys.executable, "-c", "print('what went wrong'); raise SystemExit(7)"]
        text = json.dumps(fields, sort_keys=True)
        return [sys.executable, "-c", WRITE, str(folder / "model"), text]

    def work(folder: Path, job: dict[str, Any]) -> list[str]:
        made.append("eval " + Path(job["output"]).parent.name)
        score = {"value": SCORES.get(Path(job["output"]).parent.name, 0.5), "tolerance": 0.1}
        found = {"fingerprint": job["fingerprint"], "scores": {"exam": score | {"n": 1}}}
        score |= {"low": 0, "high": 1}
        found["scores"]["exam"] |= score
        code = "import sys,pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
        return [sys.executable, "-c", code, job["output"], json.dumps(found)]

    monkeypatch.setattr(runner, "command_of", command)
    monkeypatch.setattr(runner, "work_command", work)
    monkeypatch.setattr(runner, "TemplateChain", NoChain)
    SCORES.clear()
    return made


SCORES: dict[str, float] = {}


def run(tmp_path: Path, *stages: dict[str, Any], **top: Any) -> tuple[Run, list[str]]:
    said: list[str] = []
    found = Run(read(*stages, output_dir=str(tmp_path / "run"), **top), say=said.append)
    found.run()
    return found, said


def two(tmp_path: Path, **second: Any) -> list[dict[str, Any]]:
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        rows.write_text('{"text": "a"}\n')
    first = {"stage": "sft", "dataset": str(rows)}
    return [first, {"stage": "dpo", "dataset": "hub/pairs", **second}]


def test_finished_stages_are_skipped(tmp_path: Path, calls: list[str]) -> None:
    run(tmp_path, *two(tmp_path))
    assert calls == ["sft", "dpo"]
    _, said = run(tmp_path, *two(tmp_path))
    assert calls == ["sft", "dpo"]
    assert sum("skipped" in line for line in said) == 2
    record = json.loads((tmp_path / "run/stages/dpo/stage.json").read_text())
    assert record["fields"]["model"] == str(tmp_path / "run/stages/sft/model")
    starts = json.loads((tmp_path / "run/manifest.json").read_text())["starts"]
    assert len(starts) == 2 and starts[0]["versions"]["fastpost"]


def test_a_changed_field_does_its_stage_again_and_no_other(
    tmp_path: Path, calls: list[str]
) -> None:
    run(tmp_path, *two(tmp_path))
    run(tmp_path, *two(tmp_path, beta=0.3))
    assert calls == ["sft", "dpo", "dpo"]
    assert (tmp_path / "run/stages/dpo.replaced-1/model/weights.safetensors").is_file()


def test_changed_data_do_all_that_follows_again(tmp_path: Path, calls: list[str]) -> None:
    run(tmp_path, *two(tmp_path))
    # the same name, size and time: content decides
    (tmp_path / "rows.jsonl").write_text('{"text": "b"}\n')
    run(tmp_path, *two(tmp_path))
    assert calls == ["sft", "dpo", "sft"]  # which wrote the same model: dpo's input is as it was


def test_a_changed_checkpoint_is_noticed(tmp_path: Path, calls: list[str]) -> None:
    run(tmp_path, *two(tmp_path))
    (tmp_path / "run/stages/sft/model/weights.safetensors").write_text("something else")
    run(tmp_path, *two(tmp_path))
    assert calls == ["sft", "dpo", "sft"]


def test_a_failing_stage_says_why_and_the_next_run_takes_it_up(
    tmp_path: Path, calls: list[str]
) -> None:
    with pytest.raises(StageFailed, match=r"(?s)stage dpo ended with code 7.*what went wrong"):
        run(tmp_path, *two(tmp_path, run_name="fails"))
    with pytest.raises(StageFailed):
        run(tmp_path, *two(tmp_path, run_name="fails"))
    assert calls == ["sft", "dpo", "dpo"]
    assert not (tmp_path / "run/stages/dpo.replaced-1").exists()


def test_an_interrupted_stage_goes_on_in_its_folder(tmp_path: Path, calls: list[str]) -> None:
    run(tmp_path, *two(tmp_path))
    path = tmp_path / "run/stages/dpo/stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    _, said = run(tmp_path, *two(tmp_path))
    assert calls == ["sft", "dpo", "dpo"]
    assert any("interrupted before; goes on" in line for line in said)
    assert not (tmp_path / "run/stages/dpo.replaced-1").exists()


def test_a_reference_that_was_written_to_stops_the_run(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "weights.safetensors").write_text("a")
    inner = runner.command_of

    def command(stage: Any, *rest: Any) -> list[str]:
        if stage.name == "dpo":
            (reference / "weights.safetensors").write_text("bb")
        return inner(stage, *rest)

    monkeypatch.setattr(runner, "command_of", command)
    with pytest.raises(ValueError, match="which it is compared with, changed while it ran"):
        run(tmp_path, *two(tmp_path, ref_model=str(reference)))


EXAM = [{"scorer": "reasoning_gym", "name": "exam", "task": "chain_sum", "tolerance": 0.1}]


def test_a_regression_stops_before_the_next_stage(tmp_path: Path, calls: list[str]) -> None:
    SCORES.update(start=0.5, sft=0.7, dpo=0.65)
    found, said = run(tmp_path, *two(tmp_path), evaluation=EXAM)
    assert found.scores["dpo"]["exam"]["value"] == 0.65
    assert "exam" in said[-1]
    calls.clear()
    # each falls by less than allowed from the one before, and the last by more from the best
    SCORES.update(dpo=0.61, third=0.55)
    third = {"stage": "kto", "name": "third", "dataset": "hub/x"}
    with pytest.raises(Regression, match=r"exam fell from 0.700 \(after sft\) to 0.550"):
        run(tmp_path, *two(tmp_path, beta=0.2), third, {**third, "name": "z"}, evaluation=EXAM)
    assert calls == ["dpo", "eval dpo", "third", "eval third"]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "run").mkdir()
    handle = os.open(tmp_path / "run/run.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(RecipeError, match="another run is at work"):
        run(tmp_path, *two(tmp_path))
    os.close(handle)
    run(tmp_path, *two(tmp_path))
