"""Recipes made small and run for real; a run that is killed in the middle of a stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpost.cli.run import read_pipeline
from fastpost.pipeline import smoke as smoke_module
from fastpost.pipeline.smoke import smoke
from fastpost.report.page import page_of
from fastpost.report.reading import RECORD, read_run

CLI = [sys.executable, "-m", "fastpost.cli.main"]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_small_keeps_what_the_recipe_chose(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(smoke_module, "smollm2_path", lambda: tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    small = smoke(read_pipeline("assistant-32b"))
    assert small.output_dir == "runs/assistant-32b-smoke" and small.gpus is None
    sft, dpo, grpo = (small.stage(name).fields for name in ("sft", "dpo", "grpo"))
    assert sft["optimizer"] == "adamw_8bit" and sft["dtype"] == "bfloat16" and sft["packing"]
    assert sft["dataset"] == "stage:clean-rows" and sft["model"] == str(tmp_path / "model")
    assert dpo["lora_r"] == 64 and dpo["beta"] == 0.1 and "fsdp" not in dpo
    assert small.stage("safety").fields["beta"] == 0.3
    assert grpo["reward"][0] == "maths" and grpo["beta"] == 0.04 and grpo["max_steps"] == 2
    pair = lines_of(Path(dpo["dataset"]))[0]
    assert pair["chosen"] != pair["rejected"] and pair["prompt"][-1]["role"] == "user"
    asked = lines_of(Path(grpo["dataset"]))[0]
    assert asked["solution"].lstrip("-").isdigit()
    sources = small.stage("sft-rows").fields["sources"]
    texts = {Path(source["data"]).read_text() for source in sources.values()}
    assert len(texts) == len(sources) == 4  # each source has problems of its own


@pytest.mark.slow(minutes=3)
def test_the_whole_pipeline_runs_small(tmp_path: Path) -> None:
    started = time.monotonic()
    command = [*CLI, "run", "assistant-32b", "--smoke", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert time.monotonic() - started < 900
    folder = tmp_path / "run-smoke"
    run = read_run(folder)
    stages = {stage.name: stage for stage in run.stages}
    assert all(stage.finished for stage in run.stages)
    for name in ("sft", "dpo", "safety", "grpo"):
        assert [step for step, _ in stages[name].curves["loss"]] == [1, 2], name
        assert stages[name].tokens and stages[name].curves["tokens/s"]
    assert stages["dpo"].curves["loss"][0][1] == pytest.approx(0.6931, abs=2e-3)  # log 2
    assert {"start", "sft", "dpo-merged", "safe", "reasoner"} == {
        stage.name for stage in run.stages if stage.scores
    }
    # what is exported is a model of its own: not the one the run began with, nor the SFT one
    weights = [
        load_file(folder / f"stages/{name}/model/model.safetensors")
        for name in ("sft", "assistant")
    ]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not list((folder / "stages/assistant/model").glob("*.jsonl"))
    assert "<svg" in page_of([run])
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "wrote" not in again.stdout
    assert again.stdout.count("finished before; skipped") == 10


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("name", ["sft-70b", "qlora-70b"])
def test_a_single_recipe_runs_small(name: str, tmp_path: Path) -> None:
    """Those of 32B are the stages of the whole pipeline, which runs above."""
    command = [*CLI, "run", name, "--smoke", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    stages = {stage.name: stage for stage in read_run(tmp_path / "run-smoke").stages}
    assert [step for step, _ in stages["sft"].curves["loss"]] == [1, 2]


@pytest.mark.slow(minutes=1)
def test_a_run_killed_in_a_stage_goes_on_from_its_checkpoint(
    tiny_model: Path, tmp_path: Path
) -> None:
    row = {"text": "one two three four"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 40)
    (tmp_path / "exam.jsonl").write_text(json.dumps({"text": "five six seven eight nine"}) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\noutput_dir: run\nstages:\n"
        "  - {stage: decontaminate, name: rows, train: rows.jsonl, against: [exam.jsonl], n: 4}\n"
        "  - {stage: sft, dataset: stage:rows, max_steps: 60, per_device_train_batch_size: 2, "
        "save_steps: 2, save_total_limit: 2, use_cpu: true, bf16: false, learning_rate: 1e-3}\n"
    )
    command = [*CLI, "run", "recipe.yaml"]
    with open(tmp_path / "first.txt", "w") as said:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=said, stderr=said, start_new_session=True
        )
        model = tmp_path / "run/stages/sft/model"
        deadline = time.monotonic() + 240
        while not list(model.glob("checkpoint-*")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "first.txt").read_text()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)  # the run and its stage, in the middle of it
        process.wait()
    record = json.loads((tmp_path / "run/stages/sft/stage.json").read_text())
    assert not record["finished"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "finished before; skipped" in done.stdout and "interrupted before; goes on" in done.stdout
    )
    begins = [entry["step"] for entry in lines_of(model / RECORD) if entry["event"] == "begin"]
    assert len(begins) == 2 and begins[0] == 0 and 0 < begins[1] < 60
    steps = [step for step, _ in read_run(tmp_path / "run").stages[1].curves["loss"]]
    assert steps == list(range(1, 61))  # none lost, none twice
