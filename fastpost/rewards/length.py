"""Length in the reward: two penalties, both 0 for short completions and never positive.

Lengths are in tokens. TRL passes `completion_ids`; without them a `count_tokens` function is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .completion import Completion, Reward, completion_text

CountTokens = Callable[[str], int]


def soft_overlong_punishment(length: int, max_length: int, cache_length: int) -> float:
    """DAPO's R_length (arXiv:2503.14476, eq. 13), with L_max and L_cache in tokens.

    0 up to `max_length - cache_length`, then linear down to -1 at `max_length`, -1 beyond:
    at L_max 20, L_cache 4, a length of 18 gives ((20 - 4) - 18) / 4 = -0.5.
    """
    start = max_length - cache_length
    if length <= start:
        return 0.0
    return max(-1.0, (start - length) / cache_length)


def linear_penalty(length: int, budget: int, per_token: float) -> float:
    """-per_token for each token beyond `budget`."""
    return -per_token * max(0, length - budget)


def _lengths(
    completions: list[Completion], columns: dict[str, Any], count_tokens: CountTokens | None
) -> list[int]:
    if count_tokens is not None:
        return [count_tokens(completion_text(completion)) for completion in completions]
    if columns.get("completion_ids") is None:
        raise ValueError("no `completion_ids` to count; give count_tokens=")
    return [len(ids) for ids in columns["completion_ids"]]


def soft_overlong_reward(
    max_length: int, cache_length: int, *, count_tokens: CountTokens | None = None
) -> Reward:
    """Builds DAPO's soft overlong punishment as a reward."""
    if not 0 < cache_length <= max_length:
        raise ValueError(f"cache_length is {cache_length}; give 1 to max_length ({max_length})")

    def reward(
        prompts: list[Any], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        lengths = _lengths(completions, columns, count_tokens)
        return [soft_overlong_punishment(n, max_length, cache_length) for n in lengths]

    reward.__name__ = "soft_overlong_reward"
    return reward


def length_budget_reward(
    budget: int, per_token: float, *, count_tokens: CountTokens | None = None
) -> Reward:
    """Builds the linear penalty on tokens beyond `budget` as a reward."""
    if budget < 0 or per_token <= 0:
        raise ValueError(f"budget is {budget}, per_token {per_token}; give >= 0 and > 0")

    def reward(
        prompts: list[Any], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        lengths = _lengths(completions, columns, count_tokens)
        return [linear_penalty(n, budget, per_token) for n in lengths]

    reward.__name__ = "length_budget_reward"
    return reward
