"""Pairs of answers before a judge: one `fastpost.judges.Judge`, or several as a `Panel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from fastpost.chat_model.interface import Conversation

__all__ = ["Pair", "PairJudge", "Verdict", "judge_pairs"]


class PairJudge(Protocol):
    """Says how far the first answer of each pair wins: `prefer(...).values`, in [0, 1] or None.

    `single_judged` beside `values`, where a panel gives it, flags pairs that one judge decided.
    """

    def prefer(
        self,
        criteria: str,
        prompts: Sequence[str],
        firsts: Sequence[str],
        seconds: Sequence[str],
    ) -> Any: ...


class Pair(NamedTuple):
    """Two answers to a prompt."""

    prompt: Conversation
    first: str
    second: str


class Verdict(NamedTuple):
    """How far the first answer wins, None if nobody says; and whether one judge alone said it."""

    value: float | None
    is_single: bool


def judge_pairs(judge: PairJudge, criteria: str, pairs: Sequence[Pair]) -> list[Verdict]:
    """A verdict on every pair, by one call of the judge.

    Raises:
        ValueError: the judge gave another number of verdicts.
    """
    said = judge.prefer(
        criteria,
        [_text(pair.prompt) for pair in pairs],
        [pair.first for pair in pairs],
        [pair.second for pair in pairs],
    )
    if len(said.values) != len(pairs):
        raise ValueError(
            f"a judge gave {len(said.values)} verdicts on {len(pairs)} pairs; give one each, None "
            "where there is none"
        )
    single = getattr(said, "single_judged", [True] * len(pairs))
    return [
        Verdict(None if value is None else float(value), bool(is_single))
        for value, is_single in zip(said.values, single, strict=True)
    ]


def _text(prompt: Conversation) -> str:
    """A conversation as one text: a single message by itself, several with their roles."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
