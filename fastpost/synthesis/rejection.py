"""Rejection sampling: several answers to each prompt, and the ones that a reward accepts.

    prompt ─► n samples, each with its own seed ─► filters ─► reward ≥ threshold ─► the best k

The reward is any in TRL's form (`fastpost.rewards`, a function of your own); the columns of the
prompts' rows reach it as they do in training. Source: Touvron 2023, arXiv:2307.09288, section
3.2.2; with a verifier as the reward: Yuan 2023, arXiv:2308.01825.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastpost.chat_model.estimate import estimate_calls
from fastpost.chat_model.interface import ChatModel, Conversation, ask_each
from fastpost.chat_model.usage import Estimate
from fastpost.data.rows import DataError, Row
from fastpost.data.units import words
from fastpost.rewards.completion import Completion, Reward
from fastpost.synthesis.filters import Filters, SynthesisReport, drop_unliked
from fastpost.synthesis.provenance import model_identity, sourced_row, sub_seed

__all__ = ["estimate_rejection", "sample_and_reject"]

_NOT_COLUMNS = {"prompt", "messages", "provenance"}


def sample_and_reject(
    model: ChatModel,
    rows: Sequence[Row],
    reward: Reward,
    *,
    samples: int = 8,
    keep: int = 1,
    threshold: float,
    seed: int = 0,
    source: str = "prompts",
    filters: Filters | None = None,
) -> tuple[list[Row], SynthesisReport]:
    """The best answers to prompts among those a reward accepts.

    Args:
        model: what answers.
        rows: {"prompt": text or messages, ...}; the other columns go to the reward.
        reward: `reward(prompts, completions, **columns)`, one number or None for each.
        samples: answers to each prompt.
        keep: at most so many rows of each prompt, the highest rewards first; answers that say the
            same count once.
        threshold: least reward of a row.
        seed: decides every sample.
        source: what the provenance calls the rows.
        filters: of the answers; None takes the defaults of `Filters`. Prompts are yours: none is
            dropped for resembling another.

    Returns:
        Rows {"messages", "provenance"}, the reward in the provenance, and the report.

    Raises:
        DataError: a row has no prompt of either form.
        TypeError: the model does not say what it is.
        ValueError: counts below 1, no rows, or a reward that does not give one value an answer.
    """
    if samples < 1 or keep < 1:
        raise ValueError(f"samples is {samples}, keep is {keep}; give at least 1 of each")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold is {threshold}; give a number")
    identity, filters = model_identity(model), filters or Filters()
    prompts = _prompts(rows)
    report = SynthesisReport(asked=len(rows) * samples)
    accepted: list[list[tuple[float, int, Row]]] = [[] for _ in rows]
    for number in range(samples):
        sample_seed = sub_seed(seed, "sample", number)
        answers = _answers(model, prompts, sample_seed, filters, report)
        rewards = _rewards(reward, rows, answers)
        for place, value in rewards.items():
            if value is None or not value >= threshold:
                why = "no reward" if value is None else f"reward below {threshold:g}"
                report.drop(why, answers[place])
                continue
            messages = [*prompts[place], {"role": "assistant", "content": answers[place]}]
            row = sourced_row(
                messages,
                method="rejection sampling",
                model=identity,
                seed=sample_seed,
                prompt_source=f"{source}#{place}",
                reward=float(value),
            )
            accepted[place].append((-float(value), number, row))
    kept = [row for found in accepted for row in _best(found, keep, report)]
    kept = drop_unliked(kept, filters, report)
    report.kept = len(kept)
    solved = sum(bool(found) for found in accepted)
    report.notes.append(f"{solved:,} of {len(rows):,} prompts have an accepted answer")
    return kept, report


def estimate_rejection(
    model: ChatModel,
    rows: Sequence[Row],
    *,
    samples: int = 8,
    seed: int = 0,
    seconds_per_call: float | None = None,
) -> Estimate:
    """At most what `sample_and_reject` costs, the reward apart; nothing is asked."""
    prompts = _prompts(rows)
    total = Estimate(0, 0, 0, 0, 0.0, 0.0)
    for number in range(samples):
        total = total + estimate_calls(
            model,
            prompts,
            seed=sub_seed(seed, "sample", number),
            seconds_per_call=seconds_per_call,
        )
    return total


def _prompts(rows: Sequence[Row]) -> list[Conversation]:
    """Each row's prompt as messages."""
    if not rows:
        raise ValueError("no rows; give at least one prompt")
    prompts: list[Conversation] = []
    for number, row in enumerate(rows):
        prompt = row.get("prompt")
        if isinstance(prompt, str) and prompt.strip():
            prompts.append([{"role": "user", "content": prompt}])
        elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) for m in prompt):
            prompts.append([{"role": m.get("role"), "content": m.get("content")} for m in prompt])
        else:
            raise DataError(
                f"row {number} has the prompt {str(prompt)[:100]!r} and the columns {list(row)}; "
                "expected a column prompt with a text or messages"
            )
    return prompts


def _answers(
    model: ChatModel,
    prompts: Sequence[Conversation],
    seed: int,
    filters: Filters,
    report: SynthesisReport,
) -> dict[int, str]:
    """One sample for each prompt that got one which passes the filters."""
    found: dict[int, str] = {}
    replies = dict(ask_each(model, prompts, seed=seed))
    for place in range(len(prompts)):
        reply = replies.get(place)
        if reply is None:
            report.missing += 1
            continue
        text = reply.text.strip()
        complaint = filters.complaint([{"role": "assistant", "content": text}])
        if not reply.is_whole:
            complaint = "answer cut off at max_tokens"
        if complaint is None:
            found[place] = text
        else:
            report.drop(complaint, text)
    return found


def _rewards(
    reward: Reward, rows: Sequence[Row], answers: dict[int, str]
) -> dict[int, float | None]:
    """The reward of each answer, called as in training: texts for texts, messages for messages."""
    if not answers:
        return {}
    chosen = [rows[place] for place in answers]
    prompts = [row["prompt"] for row in chosen]
    completions: list[Completion] = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(chosen, answers.values(), strict=True)
    ]
    names = dict.fromkeys(name for row in chosen for name in row if name not in _NOT_COLUMNS)
    columns: dict[str, Any] = {name: [row.get(name) for row in chosen] for name in names}
    values = list(reward(prompts=prompts, completions=completions, **columns))
    if len(values) != len(chosen):
        raise ValueError(f"the reward gave {len(values)} values for {len(chosen)} answers")
    return dict(zip(answers, values, strict=True))


def _best(found: list[tuple[float, int, Row]], keep: int, report: SynthesisReport) -> list[Row]:
    """The highest rewards, the earlier sample first among equals, each text once."""
    best: dict[str, Row] = {}
    for _, _, row in sorted(found, key=lambda item: item[:2]):
        text = row["messages"][-1]["content"]
        said = " ".join(words(text))
        if said in best:
            report.drop("repeated answer", text)
        elif len(best) == keep:
            report.drop("accepted, but not among the best", text)
        else:
            best[said] = row
    return list(best.values())
