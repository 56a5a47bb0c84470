"""Length penalties by hand-worked numbers, and the tags of an answer."""

from __future__ import annotations

import pytest

from fastpost.rewards.completion import completion_text
from fastpost.rewards.format import has_format, tagged, tags_reward
from fastpost.rewards.length import (
    length_budget_reward,
    linear_penalty,
    soft_overlong_punishment,
    soft_overlong_reward,
)


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0), (16, 0), (17, -0.25), (18, -0.5), (20, -1), (21, -1)]
)
def test_soft_overlong_punishment_is_dapo_equation_13(length: int, expected: float) -> None:
    assert soft_overlong_punishment(length, max_length=20, cache_length=4) == expected


def test_linear_penalty_starts_beyond_the_budget() -> None:
    assert [linear_penalty(n, 10, 0.5) for n in (9, 10, 11, 14)] == [0, 0, -0.5, -2]


def test_length_rewards_count_trl_s_completion_ids_or_words() -> None:
    ids = [[0] * 18, [0] * 3]
    assert soft_overlong_reward(20, 4)(["", ""], ["a", "b"], completion_ids=ids) == [-0.5, 0]
    words = length_budget_reward(1, 1.0, count_tokens=lambda text: len(text.split()))
    message = [{"role": "assistant", "content": "one two three"}]
    assert words(["", ""], ["one two", message]) == [-1, -2]
    with pytest.raises(ValueError, match="count_tokens"):
        length_budget_reward(1, 1.0)([""], ["a"])


@pytest.mark.parametrize("arguments", [(4, 0), (4, 5)])
def test_impossible_lengths_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cache_length"):
        soft_overlong_reward(*arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>\n<answer>4</answer>", 1.0),
        ("  <think>a\nb</think><answer>4</answer>\n", 1.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>4</answer> more", 0.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        ("<think></think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer><answer>4</answer>", 0.0),
        ("<think>a<answer>4</answer></think>", 0.0),
        ("4", 0.0),
    ],
)
def test_tags_reward(text: str, expected: float) -> None:
    assert tags_reward()([""], [text]) == [expected]


def test_tagged_needs_exactly_one_pair_in_order() -> None:
    assert tagged("x <a> 1 </a> y", "a") == "1"
    assert tagged("</a> 1 <a>", "a") is None
    assert tagged("<a>1</a><a>2</a>", "a") is None
    assert has_format("<a>1</a>", ("a",))


def test_only_the_assistant_s_messages_count() -> None:
    messages = [
        {"role": "assistant", "content": "one"},
        {"role": "tool", "content": "<answer>4</answer>"},
        {"role": "assistant", "content": None},
    ]
    assert completion_text(messages) == "one"
    with pytest.raises(TypeError, match="int"):
        completion_text(3)  # type: ignore[arg-type]
