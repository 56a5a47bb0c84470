"""Rewards by name, file or model, and what a wrong one says."""

from __future__ import annotations

import pytest

from fastpost.cli.recipe import UsageError
from fastpost.cli.rewards import reward_functions


def test_a_name_a_function_and_a_model(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def short(completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    maths, short, model = reward_functions(["maths", f"{file}:short", "some/reward-model"])
    assert maths(prompts=[""], completions=["The answer is $4$."], solution=["4"]) == [1.0]
    assert short(completions=["abc"]) == [-3]
    assert model == "some/reward-model"


def test_tags() -> None:
    (tags,) = reward_functions("tags")
    assert tags(prompts=["", ""], completions=["<think>a</think><answer>b</answer>", "b"]) == [
        1.0,
        0.0,
    ]


def test_what_is_missing_is_named(tmp_path) -> None:
    with pytest.raises(UsageError, match="no file"):
        reward_functions(str(tmp_path / "absent.py") + ":reward")
    file = tmp_path / "mine.py"
    file.write_text("def short(completions):\n    return []\n")
    with pytest.raises(UsageError, match="no function shirt; it has short"):
        reward_functions(f"{file}:shirt")


def test_a_rule_file(tmp_path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("- {kind: contains, weight: 2, phrases: [moon]}\n")
    (rules,) = reward_functions(str(file))
    assert rules(prompts=["", ""], completions=["a moon", "none"]) == [2.0, 0.0]
    file.write_text("- {kind: judged, statement: It rhymes.}\n")
    with pytest.raises(UsageError, match="needs a judge"):
        reward_functions(str(file))
    with pytest.raises(UsageError, match="no file"):
        reward_functions("absent.yaml")
