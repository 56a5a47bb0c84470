"""Rewards by judges: the grades of one or several models (`fastpost.judges`) in TRL's form.

A single `Judge` serves too, and every row is flagged then: give three, and their grades are
weighted by agreement. A `CachedChatModel` behind a judge pays only once for an answer that comes
again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastpost.chat_model.endpoint import EndpointChatModel
from fastpost.chat_model.interface import Sampling
from fastpost.judges.agreement import combine_by_agreement
from fastpost.judges.judge import Judge
from fastpost.judges.panel import Panel, Verdict

from .completion import Completion, completion_text

__all__ = [
    "Judge",
    "JudgeReward",
    "combine_by_agreement",
    "grade",
    "openai_judge",
    "prefer",
    "prompt_text",
]

_VERDICT_TOKENS = 256


def openai_judge(
    url: str, model: str, *, api_key: str | None = None, timeout_seconds: float = 60.0
) -> Judge:
    """A judge behind an OpenAI-compatible endpoint; `url` ends in `/chat/completions`.

    Raises:
        ValueError: a URL of another kind.
    """
    sampling = Sampling(temperature=0, max_tokens=_VERDICT_TOKENS)
    return Judge(
        EndpointChatModel(
            url, model, sampling=sampling, api_key=api_key, timeout_seconds=timeout_seconds
        )
    )


def grade(judge: Judge, criteria: str, prompt: str, answer: str) -> float | None:
    """A grade in [0, 1] for one answer; None if the judge gives none."""
    return judge.grade(criteria, [prompt], [answer])[0]


def prefer(judge: Judge, criteria: str, prompt: str, first: str, second: str) -> float | None:
    """The preference for `first`, asked in both orders: 1, 0, or 0.5 for a tie or a verdict that
    turns with the order. None if either verdict is missing."""
    return judge.prefer(criteria, [prompt], [first], [second]).values[0]


def prompt_text(prompt: Any) -> str:
    """A prompt as a judge reads it: a string as it is, a conversation turn by turn."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt):
        if len(prompt) == 1 and isinstance(prompt[0].get("content"), str):
            return prompt[0]["content"]
        return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)
    return json.dumps(prompt, ensure_ascii=False)


class JudgeReward:
    """Grades by one or more judges as a TRL reward in [0, 1].

    Attributes:
        verdict: of the last call: every judge's grades and weight.
        single_judged: for each row of the last call, whether fewer than two judges answered.

    Raises:
        ValueError: no judges, two of one name, or no criteria.
    """

    __name__ = "judge_reward"

    def __init__(self, judges: Sequence[Judge], criteria: str) -> None:
        if not judges:
            raise ValueError("no judges; give at least one, better three")
        if not criteria.strip():
            raise ValueError("no criteria; say what makes an answer good")
        self.panel, self.criteria = Panel(judges, min_judges=1), criteria
        self.verdict: Verdict | None = None

    @property
    def single_judged(self) -> list[bool]:
        return [] if self.verdict is None else self.verdict.single_judged

    def __call__(
        self, prompts: list[Any], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        answers = [completion_text(completion) for completion in completions]
        self.verdict = self.panel.grade(self.criteria, list(map(prompt_text, prompts)), answers)
        return self.verdict.values
