"""`fastpost plan`: from words to a plan, suggestions and a recipe that training takes."""

from __future__ import annotations

import json
import typing
from dataclasses import replace

import pytest

from fastpost import SFTConfig
from fastpost.cli.main import main
from fastpost.cli.recipe import read_recipe
from fastpost.cli.train import RunFields
from fastpost.planning import Adapter, Request, parse_gpus, plan
from fastpost.planning.hardware import GPUS
from fastpost.planning.recipe import command_of, recipe_text
from fastpost.planning.roofline import Assumptions, predict
from fastpost.planning.trace import trace
from tests.trainers import methods

TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def model(tmp_path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_a_plan_shows_every_assumption_and_calls_itself_a_prediction(model, capsys) -> None:
    argv = ["plan", "--model", model, "--seq", "64", "--gpus", "2xA100-40GB"]
    assert main([*argv, "--train-tokens", "1e6", "--reached", "0.3", "--price=7"]) == 0
    text = capsys.readouterr().out
    for words in ("fits: predicted peak", "headroom", "all-gather buffers", "checkpoint on disk"):
        assert words in text
    for words in ("312 TFLOP/s x 0.3", "memory 1555 GB/s", "link 300 GB/s x 0.7", "overlap 0.8"):
        assert words in text
    assert "$7 per GPU hour" in text and "predicted for these tokens" in text
    assert all(len(line) <= 100 for line in text.splitlines() if model not in line)


def test_rollouts_and_host_memory_are_shown(model, capsys) -> None:
    argv = ["plan", "--model", model, "--seq", "64", "--method", "grpo", "--rows", "8"]
    argv += ["--beta", "0.1", "--rollout-dtype", "bfloat16", "--offload", "true"]
    assert main([*argv, "--host-link", "50"]) == 0
    text = capsys.readouterr().out
    for words in ("rollout copy", "reference", "8 completions per GPU at once", "sampling "):
        assert words in text
    for words in ("rollouts from bfloat16", "pinned host memory", "host link 50 GB/s"):
        assert words in text


def test_what_does_not_fit_is_followed_by_changes_that_do(model, capsys) -> None:
    argv = ["plan", "--model", model, "--seq", "512", "--checkpointing", "false", "--json"]
    assert main(argv) == 0
    need = json.loads(capsys.readouterr().out)["predicted_peak_bytes"]
    memory = (need - 1) / 2**30 + 1
    assert main([*argv, "--gpu-memory-gb", str(memory), "--reserve-gb", "1"]) == 1
    found = json.loads(capsys.readouterr().out)
    changes = found["changes_that_fit"]
    assert not found["fits"] and len(changes) == 3
    assert changes[0]["change"] == "--checkpointing true"
    assert all(change["predicted_peak_bytes"] < need for change in changes)


def test_auto_writes_a_recipe_that_training_takes(model, tmp_path, capsys) -> None:
    file = tmp_path / "planned.yaml"
    # room for few rows only, so that the search ends early
    argv = ["plan", "--model", model, "--seq", "4096", "--gpu-memory-gb", "3.128"]
    argv += ["--optimizer", "adamw_8bit"]
    assert main([*argv, "--gpus", "H100-80GB", "--auto", str(file)]) == 0
    assert f"Written to {file}" in capsys.readouterr().out
    hints = {**typing.get_type_hints(RunFields), **typing.get_type_hints(SFTConfig)}
    values = read_recipe(["--config", str(file), "--output_dir", str(tmp_path)], hints).values
    assert values["max_length"] == 4096 and values["model"] == model and values["packing"] is True
    fields = {name: v for name, v in values.items() if name not in typing.get_type_hints(RunFields)}
    fields |= {"bf16": False}  # a CPU may lack it
    assert SFTConfig(**fields).per_device_train_batch_size == values["per_device_train_batch_size"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "8xZ9"], "COUNTxNAME"),
        (["--adapter", "prefix:3"], "KIND:RANK"),
        (["--method", "grpos"], "expected one of sft, dpo, kto"),
        (["--method", "ppo"], "ppo is not planned: it trains a value model"),
        (["--method", "online_dpo"], "online_dpo is not planned"),
        (["--beta", "0.1"], "beta and rollout_dtype are of grpo, rloo"),
        (["--offload", "true", "--checkpointing", "false"], "it needs checkpointing"),
        (["--method", "grpo", "--adapter", "qlora", "--rollout-dtype", "bfloat16"], "in 4 bits"),
        (["--tokens-per-step", "100", "--seq", "64"], "multiple of 64"),
        (["--sequence", "64"], "unknown option"),
        (["--seq"], "needs a value"),
        (["--reached", "2"], "share above 0"),
        (["--host-link", "0"], "expected GB/s above 0"),
    ],
)
def test_mistakes_are_one_line(flags, message, model, capsys) -> None:
    assert main(["plan", "--model", model, *flags]) == 2
    assert message in capsys.readouterr().err


def test_models_and_gpus_are_listed(capsys) -> None:
    assert main(["plan", "--list"]) == 0
    text = capsys.readouterr().out
    assert "Qwen/Qwen3-32B" in text and "H100-80GB" in text
    assert parse_gpus("8xH100-80GB") == (8, GPUS["H100-80GB"])


def test_time_follows_the_stated_model() -> None:
    from transformers import LlamaConfig

    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    traced = trace(Request("tiny", seq=64, num_gpus=2), LlamaConfig(**fields))
    gpu = traced.request.gpu
    found = predict(traced, Assumptions(reached=0.5, link_reached=0.5, overlap=1.0), 1e6)
    assert found.compute == pytest.approx(traced.total_flops / (gpu.tflops * 0.5e12))
    moved = sum(traced.gathered.values()) / 2
    assert found.network == pytest.approx(moved / (gpu.link * 0.5e9))
    assert found.step == pytest.approx(max(found.compute, found.network) + found.weights)
    assert found.gpu_hours == pytest.approx(1e6 / found.tokens_per_second / 3600 * 2)
    assert found.dollars == pytest.approx(found.gpu_hours * gpu.price)


TRAINED = {
    "sft": Request("", seq=64, rows=2, adapter=Adapter("qlora", 4)),
    "dpo": Request("", "dpo", seq=128, adapter=Adapter("lora", 4), optimizer="adamw_8bit"),
    "simpo": Request("", "simpo", seq=128, precision="bf16", optimizer_in_backward=True),
    "grpo": Request("", "grpo", seq=64, rows=4, group=4, beta=0.1, rollout_dtype="bfloat16"),
}
ROWS = {
    "sft": {"prompt": "what?", "completion": "this"},
    "grpo": {"prompt": [{"role": "user", "content": "what?"}]},
    "dpo": {"prompt": "what?", "chosen": "this", "rejected": "that"},
    "simpo": {"prompt": "what?", "chosen": "this", "rejected": "that"},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_written_recipes_train_as_they_are(method, tmp_path, capsys) -> None:
    folder = methods.saved_model("SFT", tmp_path)
    found = plan(replace(TRAINED[method], model=str(folder)))
    file, data = tmp_path / "planned.yaml", tmp_path / "rows.jsonl"
    file.write_text(recipe_text(found.traced, found.predicted))
    data.write_text((json.dumps(ROWS[method]) + "\n") * 8)
    argv = ["--config", str(file), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    argv += ["--use_cpu", "true", "--max_steps", "1", "--report_to", "none", "--logging_steps", "1"]
    if method == "grpo":
        argv += ["--reward", "tags"]
    assert main([command_of(found.traced.request), *argv]) == 0
    assert "Saved to" in capsys.readouterr().out
