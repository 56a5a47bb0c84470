"""A row of training data as what it is: a prompt, if there is one, and its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["COLUMN_SETS", "Sample", "sample_of"]

COLUMN_SETS = [
    ["messages"],
    ["conversations"],
    ["prompt", "completion"],
    ["chosen", "rejected"],
    ["prompt"],
    ["text"],
]

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        row: its number, from 0.
        prompt: messages or text before the answers; empty where there is none.
        answers: by column ("completion", "chosen", "rejected", "messages", "text"); none in rows
            for reinforcement learning.
        is_chat: whether these are messages.
        template_options: keyword arguments for `apply_chat_template`, the row's own.
    """

    row: int
    prompt: Any
    answers: dict[str, Any]
    is_chat: bool
    template_options: dict[str, Any]


def sample_of(number: int, row: dict[str, Any], options: dict[str, Any]) -> Sample | str:
    """The row as a sample, or what stops it from being one."""
    if (messages := row.get("messages") or row.get("conversations")) is not None:
        prompt, answers = None, {"messages": messages}
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        prompt, answers = row.get("prompt"), {k: row[k] for k in ("chosen", "rejected")}
    elif row.get("prompt") is not None:
        prompt = row["prompt"]
        has_answer = row.get("completion") is not None
        answers = {"completion": row["completion"]} if has_answer else {}
    elif row.get("text") is not None:
        prompt, answers = None, {"text": row["text"]}
    else:
        return "the row has none of the columns that training reads, or they are null"
    parts = [part for part in (prompt, *answers.values()) if part is not None]
    kinds = {_kind(part) for part in parts}
    if kinds not in ({"text"}, {"chat"}):
        return "expected texts, or lists of messages with a role and a content, and not both"
    is_chat = kinds == {"chat"}
    if is_chat:
        prompt = None if prompt is None else [_renamed(message) for message in prompt]
        answers = {name: [_renamed(m) for m in value] for name, value in answers.items()}
        if prompt is None and "chosen" in answers:
            prompt, answers = _split_prompt(answers)
    return Sample(number, prompt or ([] if is_chat else ""), answers, is_chat, options)


def _kind(part: Any) -> str:
    if isinstance(part, str):
        return "text"
    if isinstance(part, list) and part and all(_is_message(message) for message in part):
        return "chat"
    return "other"


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and bool({"role", "from"} & message.keys())


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT's keys as everybody else's; fields that Arrow filled with null left out."""
    names = {"from": "role", "value": "content"}
    found = {names.get(key, key): value for key, value in message.items() if value is not None}
    return {"content": "", **found}


def _split_prompt(answers: dict[str, Messages]) -> tuple[Messages, dict[str, Messages]]:
    """The turns that both answers begin with, then what is left, as TRL splits them."""
    chosen, rejected = answers["chosen"], answers["rejected"]
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == min(len(chosen), len(rejected)):  # equal: the last turn is the answer
        shared = max(0, shared - 1)
    return chosen[:shared], {"chosen": chosen[shared:], "rejected": rejected[shared:]}
