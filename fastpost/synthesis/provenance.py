"""Where a synthetic row comes from, written into the row.

    "provenance": {"method": "magpie", "model": "...", "sampling": {...}, "seed": 17,
                   "prompt_source": "the model's own user turn", "hash": "5f0c..."}

The hash covers the turns and all of the rest, and no time: the same run gives the same hash, and a
row that was edited afterwards no longer has its own.
"""

from __future__ import annotations

from typing import Any

from fastpost.chat_model.interface import (
    ChatModel,
    Conversation,
    IdentifiedChatModel,
    content_digest,
)
from fastpost.data.rows import Row

__all__ = ["has_its_hash", "model_identity", "sourced_row", "sub_seed"]


def model_identity(model: ChatModel) -> dict[str, Any]:
    """What the model says it is.

    Raises:
        TypeError: it does not say.
    """
    if not isinstance(model, IdentifiedChatModel):
        raise TypeError(
            f"{type(model).__name__} has no `identity`, which the provenance of its rows needs; "
            'give it one, such as {"model": "name", "temperature": 0.7}'
        )
    return dict(model.identity)


def sourced_row(
    messages: Conversation,
    *,
    method: str,
    model: dict[str, Any],
    seed: int,
    prompt_source: str,
    **measured: Any,
) -> Row:
    """A row of `messages` with its provenance.

    Args:
        messages: the turns.
        method: what made them.
        model: the model's identity.
        seed: the one the answer was sampled with.
        prompt_source: where the prompt comes from.
        measured: what else to keep, such as the reward.
    """
    sampling = {key: value for key, value in model.items() if key != "model"}
    provenance = {
        "method": method,
        "model": model.get("model"),
        "sampling": sampling,
        "seed": seed,
        "prompt_source": prompt_source,
        **measured,
    }
    provenance["hash"] = content_digest([messages, provenance])
    return {"messages": messages, "provenance": provenance}


def has_its_hash(row: Row) -> bool:
    """Whether a row's turns and provenance are as they were made."""
    provenance = dict(row["provenance"])
    stated = provenance.pop("hash", None)
    return stated == content_digest([row["messages"], provenance])


def sub_seed(seed: int, *parts: int | str) -> int:
    """A seed below 2³¹ for one part of a run; parts that differ have seeds that do."""
    return int(content_digest([seed, *parts])[:15], 16) & 0x7FFF_FFFF
