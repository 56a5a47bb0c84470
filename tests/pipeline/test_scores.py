"""Intervals, regressions, win rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpost.judges.judge import Judge
from fastpost.pipeline import scorers
from fastpost.pipeline.evaluation import best_so_far, regressions, score, table


@pytest.mark.parametrize(("right", "n"), [(0, 8), (3, 8), (57, 200), (200, 200)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    found = score([1.0] * right + [0.0] * (n - right), 0.1)
    # the shares p that the normal test at 95 % does not reject: (mean - p)^2 = z^2 p (1 - p) / n
    mean, z = right / n, 1.959963984540054
    low, high = sorted(np.roots([1 + z**2 / n, -2 * mean - z**2 / n, mean**2]).real)
    assert found["value"] == mean
    assert found["low"] == pytest.approx(low, abs=1e-6)
    assert found["high"] == pytest.approx(high, abs=1e-6)


def test_nothing_scored_is_no_score() -> None:
    with pytest.raises(ValueError, match="nothing was scored"):
        score([], 0.1)


def test_a_fall_within_the_tolerance_is_none() -> None:
    before = {"a": {"exam": score([1, 1, 0, 0], 0.25)}}
    assert regressions({"exam": score([1, 0, 0, 0], 0.25)}, best_so_far(before)) == []
    assert regressions({"exam": score([0, 0, 0, 0], 0.25)}, best_so_far(before))
    assert regressions({"new": score([0], 0.25)}, best_so_far(before)) == []
    assert "exam" in table(before) and "a" in table(before)


class LikesLong:
    """A judge's model that prefers the longer answer, wherever it stands."""

    identity: dict[str, Any]

    def __init__(self) -> None:
        self.identity = {"model": "likes-long"}

    def __call__(self, conversations: Any, *, seed: int) -> list[str]:
        replies = []
        for conversation in conversations:
            text = conversation[-1]["content"]
            long_one = text.rfind("longer" * 3)
            other = text.rfind("brief")
            replies.append(json.dumps({"better": "A" if long_one < other else "B"}))
        return replies


def test_the_win_rate_is_against_the_first_model_in_both_orders(monkeypatch) -> None:
    monkeypatch.setattr(scorers, "read_judge", lambda given: Judge(LikesLong()))
    asked = [{"name": "wins", "judge": {}, "criteria": "length"}, [[{"content": "q"}]] * 4]
    replies = ["longer" * 3, "longer" * 3, "longer" * 3, "brief"]
    firsts = ["brief", "brief", "brief", "longer" * 3]
    before = {"replies": {"wins": firsts}}
    assert scorers._preferred(*asked, replies, before) == [1.0, 1.0, 1.0, 0.0]
    assert scorers._preferred(*asked, firsts, None) == [0.5] * 4


HARNESS_TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_tasks_of_the_evaluation_harness(tiny_model: Path, tmp_path: Path) -> None:
    """A task of one's own, whose answers follow from the model's probabilities by plain torch."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows, right = [], 0
    for i, question in enumerate(["The capital of France is", "Two and two are", "Snow is"]):
        choices = ["Paris", "four", "white"]
        logps = []
        for choice in choices:
            asked, said = tokenizer(question)["input_ids"], tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([[*asked, *said]])).logits[0, len(asked) - 1 : -1]
            logps.append(logits.log_softmax(-1)[range(len(said)), said].sum())
        answer = int(np.argmax(logps)) if i else int(np.argmin(logps))  # the first is wrong
        rows.append({"question": question, "choices": choices, "answer": answer})
        right += i > 0
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    task = HARNESS_TASK.replace("QUESTIONS", str(questions))
    (tmp_path / "tasks" / "capitals.yaml").write_text(task)
    scorer = {
        "scorer": "lm_eval",
        "name": "harness",
        "tasks": ["capitals"],
        "include_path": str(tmp_path / "tasks"),
        "tolerance": 0.1,
    }
    found = scorers.evaluate(str(tiny_model), [scorer], rewards=lambda _: [], before=None)
    assert found.scores == {"capitals": score([1.0] * right + [0.0], 0.1)}
    assert not found.skipped
