"""The whole demo: in a tiny form for its files, once at a quarter for learning."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpost.demo import tasks
from fastpost.demo.run import EXAM_SEED, run_demo

pytestmark = pytest.mark.slow(minutes=5)


def test_a_tiny_demo_writes_everything_it_promises(tmp_path, capsys):
    returned = run_demo(tmp_path, sft_steps=2, dpo_steps=2, num_problems=8, num_drawn=12, seed=3)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(returned))
    assert list(metrics["accuracy"]) == ["before", "sft", "dpo"]
    assert all(0 <= share <= 1 for share in metrics["accuracy"].values())
    assert metrics["reloaded_answers_equal"]
    for stage in ("sft", "dpo"):
        log, tokens = metrics["stages"][stage]["log"], metrics["stages"][stage]["tokens"]
        assert sum("loss" in entry for entry in log) == 2
        assert 0 < tokens["unique_tokens"] < tokens["row_tokens"] < tokens["padded_tokens"]
        assert 0 < tokens["scored_tokens"] < tokens["row_tokens"]
    assert any("eval_rewards/margins" in entry for entry in metrics["stages"]["dpo"]["log"])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "SmolLM2-135M" in printed and "after DPO" in printed and "\r" not in printed

    # What is on disk is an ordinary model, and it is another one than at the start.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dpo")
    exam = tasks.evaluate(model, tokenizer, 8, seed=3 + EXAM_SEED)
    assert exam.accuracy == metrics["accuracy"]["dpo"]


def test_the_demo_learns(tmp_path):
    """A quarter of what `make demo` does."""
    metrics = run_demo(tmp_path, sft_steps=20, dpo_steps=6, num_problems=32, num_drawn=64)
    losses = [e["loss"] for e in metrics["stages"]["sft"]["log"] if "loss" in e]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert metrics["accuracy"]["sft"] > metrics["accuracy"]["before"]
    held_out = [e for e in metrics["stages"]["dpo"]["log"] if "eval_rewards/margins" in e]
    assert held_out[-1]["eval_rewards/margins"] > 0
    assert metrics["reloaded_answers_equal"]
