from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastpost.ppo.reward_scores import RewardScores
from fastpost.ppo.samples import Samples


def samples(count: int = 3) -> Samples:
    return Samples(
        prompts=["a"] * count,
        completions=[f"{i}" for i in range(count)],
        prompt_ids=[[1]] * count,
        completion_ids=[[i] for i in range(count)],
        has_ended=[True] * count,
        sampling_logps=None,
        columns={"answer": list(range(count))},
    )


def ask(functions: Any, weights: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    return RewardScores(functions, weights, None, prefix_sharing=True, rows=2)(samples())


def test_weighted_sum_without_those_of_no_opinion() -> None:
    def one(completions, answer, **_):
        return [float(text) + number for text, number in zip(completions, answer, strict=True)]

    def two(**_):
        return [10.0, None, None]

    total, rewards = ask([one, two], [0.5, 2.0])
    assert total.tolist() == [20.0, 1.0, 2.0]
    assert rewards[:, 0].tolist() == [0.0, 2.0, 4.0]
    assert rewards[0, 1] == 10 and rewards[1:, 1].isnan().all()


def test_nobody_has_an_opinion() -> None:
    total, _ = ask(lambda **_: [1.0, None, 3.0])
    assert total[0] == 1 and math.isnan(total[1]) and total[2] == 3


def test_functions_of_one_name_are_told_apart() -> None:
    scores = RewardScores(
        [lambda **_: [0.0], lambda **_: [1.0]], None, None, prefix_sharing=True, rows=2
    )
    assert scores.names == ["<lambda>", "<lambda>_2"]


def test_what_is_not_a_reward() -> None:
    with pytest.raises(ValueError, match="infinite reward"):
        ask(lambda **_: [math.inf, 0.0, 0.0])
    with pytest.raises(ValueError, match="returned 2 rewards for 3 completions"):
        ask(lambda **_: [0.0, 0.0])

    async def later(**_):
        return [0.0]

    with pytest.raises(TypeError, match="make it synchronous"):
        ask(later)
