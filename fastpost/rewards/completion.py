"""The text of a completion, whichever of TRL's two forms it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Completion = str | list[dict[str, Any]]
Reward = Callable[..., list[float | None]]


def completion_text(completion: Completion) -> str:
    """A string as it is; of a conversation, the contents of the assistant's messages.

    Raises:
        TypeError: neither a string nor a list of messages.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list) or not all(isinstance(m, dict) for m in completion):
        raise TypeError(
            f"a completion is {type(completion).__name__}; give a string or a list of messages "
            "{'role': ..., 'content': ...}"
        )
    parts = [m.get("content") for m in completion if m.get("role", "assistant") == "assistant"]
    return "\n".join(part for part in parts if isinstance(part, str))


def column(name: str, columns: dict[str, Any], num_rows: int) -> Sequence[Any]:
    """The dataset column `name`; raises ValueError where it is absent or of another length."""
    if name not in columns:
        raise ValueError(f"no column {name!r}; the dataset has {sorted(columns)}. Name the column")
    values = columns[name]
    if len(values) != num_rows:
        raise ValueError(f"column {name!r} has {len(values)} rows, completions {num_rows}")
    return values
