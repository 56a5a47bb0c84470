"""The whole demo: in a tiny form for its files, once at half size for what it teaches."""

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


def test_the_demo_teaches_problems_it_never_trained_on(tmp_path):
    # Half of what `make demo` does: enough to see it learn.
    metrics = run_demo(tmp_path, sft_steps=45, num_problems=64, num_drawn=160)
    accuracy = metrics["accuracy"]
    assert accuracy["before"] < 0.2
    assert accuracy["sft"] > accuracy["before"] + 0.3
    assert accuracy["dpo"] > accuracy["before"] + 0.3
    held_out = [e for e in metrics["stages"]["dpo"]["log"] if "eval_rewards/margins" in e]
    assert held_out[-1]["eval_rewards/margins"] > 0
    assert held_out[-1]["eval_rewards/accuracies"] > 0.7
