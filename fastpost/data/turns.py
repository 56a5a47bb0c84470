"""Who says what in a row, whichever of the usual columns it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastpost.data.passages import Place, passages
from fastpost.data.rows import Row

__all__ = ["Turn", "row_texts", "turns"]

_CONVERSATIONS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
_ROLES = {"prompt": "user", "completion": "assistant", "chosen": "assistant"}
_SHAREGPT = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Turn:
    """A turn's role, its text, and the text's place in the row."""

    role: str
    text: str
    place: Place


def turns(row: Row) -> Iterator[Turn]:
    """The turns with a text, in the order of their columns; rejected answers left out.

    Where chosen answers repeat the prompt, so do the turns. A plain `text` column has no turns.
    """
    for name in _CONVERSATIONS:
        value = row.get(name)
        if name == "rejected" or value is None:
            continue
        if isinstance(value, str) and name in _ROLES:
            yield Turn(_ROLES[name], value, (name,))
        elif isinstance(value, list):
            yield from _of_messages(name, value)


def _of_messages(name: str, messages: list[Any]) -> Iterator[Turn]:
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        role = str(message.get("role") or message.get("from") or "")
        role = _SHAREGPT.get(role, role)
        key = "content" if "content" in message else "value"
        content = message.get(key)
        if isinstance(content, str):
            yield Turn(role, content, (name, index, key))
        elif isinstance(content, list):
            for part, found in enumerate(content):
                if isinstance(found, dict) and isinstance(found.get("text"), str):
                    yield Turn(role, found["text"], (name, index, key, part, "text"))


def row_texts(row: Row) -> list[str]:
    """What a model reads of a row: its turns; else its `text`; else every text there is."""
    found = [turn.text for turn in turns(row)]
    if not found and isinstance(row.get("text"), str):
        return [row["text"]]
    return found or [text for _, text in passages(row)]
