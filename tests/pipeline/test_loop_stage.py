"""Every loop as a stage: one file in which each goes on from the model of the one before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpost.loops import LOOPS
from fastpost.pipeline import smoke as smoke_module
from fastpost.pipeline.loop_stage import check_loop
from fastpost.report.page import page_of
from fastpost.report.reading import read_run
from tests.chat_model.endpoint_server import reply, serving
from tests.judges.fake_judges import texts_of
from tests.pipeline.conftest import read

TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
SAMPLED = TRAINING | {"num_generations": 4, "max_completion_length": 6}
SAMPLER = {"temperature": 1.0, "max_tokens": 6, "batch_size": 8}
SCORERS = [{"scorer": "reward", "dataset": "exam.jsonl", "reward": "rewards.py:variety"}]
CONSTITUTION = """\
principles:
  - {name: brief, critique: "Is it brief?", revise: Be brief., prefer: The briefer is better.}
"""
REWARDS = """\
def variety(completions, **columns):
    return [len(set(str(completion))) / 100 for completion in completions]
"""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def prefer_the_briefer(body: dict[str, Any]) -> Any:
    texts = texts_of(body["messages"][-1]["content"])
    first, second = ((len(texts[f"answer_{side}"]), texts[f"answer_{side}"]) for side in "AB")
    return reply(json.dumps({"better": "A" if first < second else "B"}))


def stages(judge: dict[str, Any]) -> list[dict[str, Any]]:
    lists = {"prompts": "prompts.jsonl", "sampler": SAMPLER}
    rewarded = lists | {"rewards": "rewards.py:variety"}
    return [
        {"stage": "rejection_sampling", "threshold": 0.0, "sft": TRAINING, **rewarded},
        {
            "stage": "spin",
            "rows": "answers.jsonl",
            "sampler": SAMPLER,
            "scorers": SCORERS,
            "metric": "reward",
            "max_iterations": 1,
            "dpo": TRAINING | {"lora_r": 4},
        },
        {"stage": "iterated", "sft_rows": None, "cycles": 1, "dpo": TRAINING, **rewarded},
        {
            "stage": "length_control",
            "rows": "pairs.jsonl",
            "probes": "prompts.jsonl",
            "way": "normalised",
            "sampler": SAMPLER,
            "training": TRAINING,
        },
        {
            "stage": "online_judge",
            "prompts": "prompts.jsonl",
            "judge": judge,
            "criteria": "The better answer is the briefer one.",
            "online_dpo": TRAINING | {"max_new_tokens": 6, "max_length": 64},
        },
        {
            "stage": "constitutional",
            "constitution": "constitution.yaml",
            "judge": judge,
            "sft": TRAINING,
            "dpo": TRAINING,
            **lists,
        },
        {
            "stage": "r1",
            "cold_start": "answers.jsonl",
            "problems": "prompts.jsonl",
            "rewards": "rewards.py:variety",
            "threshold": 0.0,
            "sampler": SAMPLER,
            "sft": TRAINING,
            "grpo": SAMPLED,
        },
    ]


def test_small_loops_keep_their_trainings(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(smoke_module, "smollm2_path", lambda: tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    given = {stage["stage"]: stage for stage in stages({"model": "m", "endpoint": "http://x"})}
    constitutional = given.pop("constitutional")
    with pytest.raises(ValueError, match="no judge that tells short answers"):
        smoke_module.smoke(read(constitutional))
    small = smoke_module.smoke(read(*given.values()))
    for stage in small.stages:
        check_loop(stage.kind, stage.fields, stage.name)
        for name, value in stage.fields.items():
            if isinstance(value, dict) and "max_steps" in value:
                assert value["max_steps"] == 2 and value["learning_rate"] == 1e-3, name
    fields = {stage.kind: stage.fields for stage in small.stages}
    assert fields["spin"]["dpo"]["lora_r"] == 4 and fields["spin"]["max_iterations"] == 1
    assert fields["spin"]["scorers"][0]["name"] == fields["spin"]["metric"] == "reward"
    assert fields["online_judge"]["judge"]["weighs_choices"]
    pair = json.loads(Path(fields["length_control"]["rows"]).read_text().splitlines()[0])
    assert pair["chosen"] != pair["rejected"]
    answered = json.loads(Path(fields["r1"]["cold_start"]).read_text().splitlines()[0])
    assert set(answered) == {"prompt", "completion"}


@pytest.mark.slow(minutes=2)
def test_every_loop_is_a_stage(tiny_model: Path, tmp_path: Path) -> None:
    questions = [f"What is {i} and {i + 1}?" for i in range(8)]
    prompts = [said("user", text) for text in questions]
    write(tmp_path / "prompts.jsonl", [{"prompt": p} for p in prompts])
    write(tmp_path / "exam.jsonl", [{"prompt": said("user", "What is left?")}])
    write(
        tmp_path / "answers.jsonl",
        [
            {"prompt": p, "completion": said("assistant", f"It is {i}.")}
            for i, p in enumerate(prompts)
        ],
    )
    sides = {"chosen": said("assistant", "Yes."), "rejected": said("assistant", "No, not so.")}
    write(tmp_path / "pairs.jsonl", [{"prompt": p, **sides} for p in prompts])
    (tmp_path / "constitution.yaml").write_text(CONSTITUTION)
    (tmp_path / "rewards.py").write_text(REWARDS)

    with serving(prefer_the_briefer) as endpoint:
        judge = {"model": "judge", "endpoint": endpoint.url}
        recipe = {"model": str(tiny_model), "output_dir": "run", "stages": stages(judge)}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "fastpost.cli.main", "run", "recipe.yaml"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        asked = len(endpoint.received)
        again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.stdout.count("finished before; skipped") == len(LOOPS)
    assert asked == len(endpoint.received) > 0
    run = read_run(tmp_path / "run")
    loops = [stage for stage in run.stages if "/" not in stage.name]
    assert {stage.name for stage in loops} == set(LOOPS)
    before = str(tiny_model)
    for stage in loops:
        folder = tmp_path / "run/stages" / stage.name
        job = json.loads((folder / "job.json").read_text())
        assert job["model"] == before
        before = json.loads((folder / "loop/result.json").read_text())["checkpoint"]
        assert (tmp_path / before / "model.safetensors").exists()
    trained = {stage.name: stage for stage in run.stages if stage not in loops}
    assert len(trained) >= 11 and all(s.curves["loss"] and s.tokens for s in trained.values())
    assert trained["r1/2-reasoning-rl"].curves["reward"] and trained["r1/2-reasoning-rl"].finished
    page = page_of([run])
    assert "<svg" in page and "r1/2-reasoning-rl" in page
