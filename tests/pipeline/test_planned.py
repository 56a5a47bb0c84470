"""From a stage's fields to a plan and back; whether the bundled recipes still fit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fastpost.cli.main import main
from fastpost.cli.run import bundled_recipes, read_pipeline
from fastpost.pipeline import planned
from fastpost.pipeline.planned import plan_stages, request_of, training_tokens
from fastpost.planning import planner
from fastpost.planning.recipe import recipe_fields
from fastpost.planning.request import Adapter, Request, parse_gpus
from tests.pipeline.conftest import read

TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip

COUNT, GPU = parse_gpus("8xH100-80GB")
REQUESTS = [
    Request("m", num_gpus=8, precision="bf16", optimizer="adamw_8bit", tokens_per_step=8 * 8192),
    Request(
        "m", num_gpus=8, precision="bf16", optimizer="adamw_8bit", optimizer_in_backward=True,
        tokens_per_step=8 * 8192, offload=True, mlp_tile_tokens=4096,
    ),
    Request("m", "dpo", num_gpus=8, adapter=Adapter("lora", 64), tokens_per_step=2 * 4 * 65536),
    Request("m", "kto", num_gpus=8, adapter=Adapter("dora", 32), tokens_per_step=4 * 65536),
    Request("m", num_gpus=8, adapter=Adapter("qlora", 16), tokens_per_step=65536, rows=1),
    Request("m", "reward", num_gpus=8, precision="fp32", tokens_per_step=2 * 65536),
    Request("m", "simpo", num_gpus=8, tokens_per_step=2 * 65536, memory_budget_gb=0.5),
    Request(
        "m", "grpo", num_gpus=8, seq=1536, prompt=1024.5 / 1536, beta=0.04, rows=2,
        tokens_per_step=2 * 8 * 2 * 1536, rollout_dtype="bfloat16",
    ),
    Request("m", "rloo", num_gpus=8, seq=512, prompt=256.5 / 512, tokens_per_step=8 * 512),
]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r.method}-{r.adapter}")
def test_fields_of_a_plan_are_planned_as_that_plan(request_: Request) -> None:
    fields = recipe_fields(request_)
    kind = "cpo" if request_.method == "simpo" else request_.method
    plan: dict[str, Any] = {}
    if request_.samples:
        plan["prompt_tokens"] = request_.num_prompt
    stage = {"stage": kind, "dataset": "x", "plan": plan, **fields}
    pipeline = read(stage, gpus="8xH100-80GB", model="m")
    found = request_of(pipeline, pipeline.stages[0], kind, pipeline.stages[0].fields)
    assert found == request_
    assert found.num_prompt == request_.num_prompt


def test_what_has_no_plan_is_refused_not_guessed() -> None:
    for fields, said in (
        ({"optim": "adafactor"}, "optim 'adafactor' has no plan"),
        ({"dtype": "float16"}, "dtype float16"),
        ({"lora_r": 8, "dtype": "float32", "bf16": True}, "dtype float32 with bf16 True"),
    ):
        pipeline = read({"stage": "sft", "dataset": "x", **fields}, gpus="H100-80GB")
        with pytest.raises(ValueError, match=said):
            plan_stages(pipeline)


@pytest.mark.parametrize(
    ("fields", "plan", "tokens"),
    [
        ({"max_steps": 10}, {}, 10 * 2 * 128 * 8 * 2),
        ({"num_train_epochs": 1.5}, {"rows": 100, "tokens": 50}, 1.5 * 100 * 50 * 2),
        ({}, {"rows": 100}, 3 * 100 * 128 * 2),
        ({}, {}, None),
    ],
)
def test_the_length_of_a_training(fields, plan, tokens) -> None:
    stage = {
        "stage": "dpo", "dataset": "x", "max_length": 128, "gradient_accumulation_steps": 2,
        "plan": plan, **fields,
    }  # fmt: skip
    pipeline = read(stage, gpus="H100-80GB")
    found = request_of(pipeline, pipeline.stages[0], "dpo", pipeline.stages[0].fields)
    assert training_tokens(found, pipeline.stages[0], pipeline.stages[0].fields) == tokens


def test_plan_says_what_does_not_fit_and_runs_nothing(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    path = tmp_path / "recipe.yaml"
    stage = "dataset: none.jsonl, max_length: 64, dtype: float32, max_steps: 10"
    path.write_text(
        f"model: {tmp_path}/config.json\noutput_dir: {tmp_path}/run\ngpus: 2xH100-80GB\nstages:\n"
        f"  - {{stage: sft, {stage}}}\n  - {{stage: ppo, {stage}, reward: maths}}\n"
        f"  - {{stage: dpo, name: long, {stage}, per_device_train_batch_size: 4}}\n"
    )
    # of ppo, max_length is no field
    path.write_text(
        path.read_text().replace(
            "ppo, dataset: none.jsonl, max_length: 64,", "ppo, dataset: none.jsonl,"
        )
    )
    assert main(["run", str(path), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "predictions" in said and "not planned: it trains a value model" in said
    plans = json.loads((tmp_path / "run/plan.json").read_text())
    assert [plan["name"] for plan in plans] == ["sft", "ppo", "long"]
    assert plans[0]["fits"] and plans[0]["prediction"]["dollars"] > 0
    assert not (tmp_path / "run/stages").exists()
    path.write_text(path.read_text().replace("gpus: 2xH100-80GB\n", ""))
    assert main(["run", str(path), "--plan"]) == 2
    assert "gpus is missing" in capsys.readouterr().err


@pytest.mark.slow(minutes=1)
def test_every_bundled_recipe_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    done: dict[Request, Any] = {}
    trace = planner.trace_composed

    def once(request: Request, config: Any = None) -> Any:
        if request not in done:
            done[request] = trace(request, config)
        return done[request]

    monkeypatch.setattr(planner, "trace_composed", once)
    names = bundled_recipes()
    for name in names:
        for found in plan_stages(read_pipeline(name)):
            assert found.plan is not None, (name, found.name, found.reason)
            assert found.plan.fits, (name, found.name, found.plan.text())
            assert found.plan.predicted.dollars is not None, (name, found.name)
    assert len(done) == 6  # SFT, DPO, safety, GRPO at 32B; SFT, QLoRA at 70B

    # and the test can fail: two of the same GPUs do not hold the same
    small = dataclasses.replace(read_pipeline("sft-70b"), gpus="2xH100-80GB")
    monkeypatch.setattr(
        planned, "plan", lambda *a, **k: planner.plan(*a, **{**k, "suggest": False})
    )
    assert not any(found.plan.fits for found in plan_stages(small))
