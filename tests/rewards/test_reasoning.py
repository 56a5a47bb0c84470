"""reasoning_gym's own verifier decides; the tag decides what it sees."""

from __future__ import annotations

import pytest
import reasoning_gym

from fastpost.rewards.reasoning import reasoning_gym_reward


def test_the_dataset_s_verifier_scores_the_tagged_answer() -> None:
    dataset = reasoning_gym.create_dataset("leg_counting", size=2, seed=1)
    right = dataset[1]["answer"]
    completions = [f"<answer>{right}</answer>", "<answer>-5</answer>", right, "<answer>1</answer>"]
    scores = reasoning_gym_reward(dataset)([""] * 4, completions, index=[1, 1, 1, None])
    assert scores[0] == 1.0 and scores[3] is None
    assert scores[1] is not None and scores[1] < 0.1 and scores[2] == 0.0
    assert reasoning_gym_reward(dataset, answer_tag=None)([""], [right], index=[1]) == [1.0]


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="score_answer"):
        reasoning_gym_reward([])
