"""Several answers to each prompt, drawn and graded once: what loops choose their rows from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from fastpost.chat_model.interface import ChatModel, Conversation
from fastpost.data.rows import Row
from fastpost.loops.run import LoopRun, Sampler, prompt_rows

__all__ = [
    "Candidate",
    "Reward",
    "answer",
    "draw",
    "grade",
    "preference_row",
    "sft_row",
    "supervised_rows",
]

Reward = Callable[..., Sequence[float | None]]  # in TRL's form


class Candidate(NamedTuple):
    """An answer and its reward; None where no reward could say."""

    text: str
    reward: float | None


def draw(
    run: LoopRun,
    stage: str,
    sampler: Sampler,
    model: Any,
    prompts: Sequence[Conversation],
    count: int,
) -> list[list[str]]:
    """Up to `count` different answers of a model to every prompt, in the order they were drawn.

    A reply that is missing or empty is left out.
    """
    chat: Callable[[], ChatModel] = cache(lambda: sampler(str(model)))
    rounds = [run.ask(f"{stage}/{k}", chat, prompts) for k in range(count)]
    return [
        list(dict.fromkeys(reply for reply in replies if reply is not None and reply.strip()))
        for replies in zip(*rounds, strict=True)
    ]


def grade(
    run: LoopRun,
    stage: str,
    rewards: Reward | Sequence[Reward],
    rows: Sequence[Row],
    answers: Sequence[Sequence[str]],
    weights: Sequence[float] | None = None,
) -> list[list[Candidate]]:
    """Answers `[row][k]` with their reward, the weighted sum of `rewards`, best first.

    A reward that says None of an answer has no part in its sum. Other columns of a row reach the
    reward functions, as in TRL. Equal rewards keep the order of the answers.

    Raises:
        ValueError: another number of weights than of rewards.
    """
    functions = [rewards] if callable(rewards) else list(rewards)
    factors = [1.0] * len(functions) if weights is None else list(weights)
    if not functions or len(factors) != len(functions):
        raise ValueError(f"{len(functions)} rewards and {len(factors)} weights; give one each")
    flat = [(row, text) for row, texts in zip(rows, answers, strict=True) for text in texts]

    def call(number: int, batch: Sequence[tuple[Row, str]]) -> list[float | None]:
        columns: Mapping[str, list[Any]] = {
            name: [row.get(name) for row, _ in batch]
            for name in dict.fromkeys(name for row, _ in batch for name in row)
            if name != "prompt"
        }
        scores = [
            function(
                prompts=[row["prompt"] for row, _ in batch],
                completions=[_assistant(text) for _, text in batch],
                **columns,
            )
            for function in functions
        ]
        return [_weighted(said, factors) for said in zip(*scores, strict=True)]

    values = iter(run.batched(stage, flat, call))
    graded = [[Candidate(text, next(values)) for text in texts] for texts in answers]
    return [
        sorted(group, key=lambda c: float("-inf") if c.reward is None else c.reward, reverse=True)
        for group in graded
    ]


def _weighted(said: Sequence[float | None], factors: Sequence[float]) -> float | None:
    known = [f * float(s) for f, s in zip(factors, said, strict=True) if s is not None]
    return sum(known) if known else None


def _assistant(text: str) -> Conversation:
    return [{"role": "assistant", "content": text}]


def answer(row: Row, column: str) -> str:
    """The text of a row's answer, given as text or as messages."""
    value = row[column]
    return value if isinstance(value, str) else str(value[-1]["content"])


def sft_row(prompt: Conversation, text: str) -> Row:
    """A row for `SFTTrainer`."""
    return {"prompt": prompt, "completion": _assistant(text)}


def supervised_rows(run: LoopRun, name: str) -> list[Row]:
    """The run's data `name`, prompts and completions, as rows for `SFTTrainer`; none if absent."""
    rows = prompt_rows(run.data.get(name, []), name, "completion")
    return [sft_row(row["prompt"], answer(row, "completion")) for row in rows]


def preference_row(prompt: Conversation, chosen: str, rejected: str) -> Row:
    """A row for `DPOTrainer` and `RewardTrainer`."""
    return {"prompt": prompt, "chosen": _assistant(chosen), "rejected": _assistant(rejected)}
