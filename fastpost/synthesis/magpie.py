"""Magpie: an aligned model writes its own users' messages, and answers them.

    header of a user turn ─► the model writes the message ─► filters ─► the model answers ─► filters

No seed prompts: the model's own alignment data decide what is asked. A system message steers it, to
a subject or a language. Source: Xu 2024, arXiv:2406.08464, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastpost.chat_model.estimate import estimate_calls
from fastpost.chat_model.interface import (
    ChatModel,
    Conversation,
    Reply,
    UserTurnModel,
    ask_each,
)
from fastpost.chat_model.usage import Estimate
from fastpost.data.rows import Row
from fastpost.synthesis.filters import Filters, SynthesisReport, drop_repeated, drop_unliked
from fastpost.synthesis.provenance import model_identity, sourced_row, sub_seed

__all__ = ["estimate_magpie", "magpie"]

# What a turn is taken to be long for the estimate, in characters.
_TURN = 400


def magpie(
    model: ChatModel,
    count: int,
    *,
    seed: int = 0,
    system: str | None = None,
    turns: int = 1,
    filters: Filters | None = None,
) -> tuple[list[Row], SynthesisReport]:
    """Conversations that the model has with itself.

    Args:
        model: one that can write a user's turn (`LocalChatModel`, cached or not).
        count: candidates; rows that filters drop are not made up for.
        seed: decides every sample.
        system: system message of every conversation, which its rows keep.
        turns: pairs of a question and an answer in each.
        filters: None takes the defaults of `Filters`.

    Returns:
        Rows {"messages", "provenance"} and the report.

    Raises:
        TypeError: the model cannot write a user's turn, or does not say what it is.
        ValueError: `count` or `turns` is below 1.
    """
    if count < 1 or turns < 1:
        raise ValueError(f"count is {count}, turns is {turns}; give at least 1 of each")
    if not isinstance(model, UserTurnModel):
        raise TypeError(
            f"{type(model).__name__} cannot continue the header of a user's turn, which takes the "
            "chat template; use a local model, or the teacher method on seed topics"
        )
    identity, filters = model_identity(model), filters or Filters()
    report = SynthesisReport(asked=count)
    start: Conversation = [] if system is None else [{"role": "system", "content": system}]
    numbers = list(range(count))
    talks = [list(start) for _ in numbers]
    for turn in range(turns):
        seeds = [sub_seed(seed, "magpie user", number, turn) for number in numbers]
        asked = _extended(talks, "user", dict(model.stream_user_turns(talks, seeds)), report)
        kept = _sound(talks, asked, filters, report)
        if turn == 0:
            fresh = drop_repeated([talks[place] for place in kept], filters, report)
            kept = [kept[place] for place in fresh]
        talks, numbers = [talks[place] for place in kept], [numbers[place] for place in kept]
        answers = dict(ask_each(model, talks, seed=sub_seed(seed, "magpie answer", turn)))
        kept = _sound(talks, _extended(talks, "assistant", answers, report), filters, report)
        talks, numbers = [talks[place] for place in kept], [numbers[place] for place in kept]
    rows = [
        sourced_row(
            messages,
            method="magpie",
            model=identity,
            seed=sub_seed(seed, "magpie user", number, 0),
            prompt_source="the model's own user turn",
        )
        for number, messages in zip(numbers, talks, strict=True)
    ]
    rows = drop_unliked(rows, filters, report)
    report.kept = len(rows)
    return rows, report


def estimate_magpie(
    model: ChatModel,
    count: int,
    *,
    seed: int = 0,
    turns: int = 1,
    seconds_per_call: float | None = None,
) -> Estimate:
    """At most what `magpie` costs; nothing is asked. What is in the cache already is not taken off,
    and a turn is taken to have 400 characters."""
    total = Estimate(0, 0, 0, 0, 0.0, 0.0)
    for turn in range(2 * turns):
        talk = [{"role": "user", "content": "x" * _TURN}] * (turn or 1)
        total = total + estimate_calls(
            model,
            [talk] * count,
            seed=seed,
            cache_as=[["unknown turn", turn, number] for number in range(count)],
            seconds_per_call=seconds_per_call,
        )
    return total


def _extended(
    talks: list[Conversation],
    role: str,
    replies: dict[int, Reply | None],
    report: SynthesisReport,
) -> list[int]:
    """Adds a turn to each conversation that got a whole one; the places of these."""
    kept = []
    for place, talk in enumerate(talks):
        reply = replies.get(place)
        if reply is None:
            report.missing += 1
        elif not reply.is_whole:
            report.drop(f"{role} turn cut off at max_tokens", reply.text)
        else:
            talk.append({"role": role, "content": reply.text.strip()})
            kept.append(place)
    return kept


def _sound(
    talks: list[Conversation], places: Sequence[int], filters: Filters, report: SynthesisReport
) -> list[int]:
    """Places whose last turn passes the filters."""
    kept = []
    for place in places:
        complaint = filters.complaint(talks[place][-1:])
        if complaint is None:
            kept.append(place)
        else:
            report.drop(complaint, talks[place][-1]["content"])
    return kept
