"""reasoning_gym's scorers as a reward: any of its generated tasks, checked by its own verifier."""

from __future__ import annotations

from typing import Any

from .completion import Completion, Reward, column, completion_text
from .format import tagged


def reasoning_gym_reward(
    dataset: Any, *, index_column: str = "index", answer_tag: str | None = "answer"
) -> Reward:
    """Builds the reward in [0, 1] from a `reasoning_gym` dataset.

    Args:
        dataset: from `reasoning_gym.create_dataset(...)`: has `score_answer(answer, entry)`.
        index_column: the column that holds each row's position in `dataset`.
        answer_tag: the answer is what stands in this tag, absent: 0.0. None: the whole text.

    Raises:
        TypeError: `dataset` has no `score_answer`.
    """
    if not callable(getattr(dataset, "score_answer", None)):
        raise TypeError(
            f"{type(dataset).__name__} has no score_answer; give reasoning_gym.create_dataset(...)"
        )

    def score(completion: Completion, index: int | None) -> float | None:
        if index is None:
            return None
        text = completion_text(completion)
        answer = text.strip() if answer_tag is None else tagged(text, answer_tag)
        if answer is None:
            return 0.0
        return float(dataset.score_answer(answer, dataset[index]))

    def reward(
        prompts: list[Any], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        indices = column(index_column, columns, len(completions))
        return [score(c, i) for c, i in zip(completions, indices, strict=True)]

    reward.__name__ = "reasoning_gym_reward"
    return reward
