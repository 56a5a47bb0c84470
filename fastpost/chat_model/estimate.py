"""What a set of conversations will cost, before any call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpost.chat_model.cache import CachedChatModel
from fastpost.chat_model.interface import ChatModel, Conversation, Sampling
from fastpost.chat_model.usage import Estimate, Price, Usage, estimate_tokens

__all__ = ["estimate_calls"]


def estimate_calls(
    model: ChatModel,
    conversations: Sequence[Conversation],
    *,
    seed: int,
    cache_as: Sequence[Any] | None = None,
    seconds_per_call: float | None = None,
) -> Estimate:
    """Calls, tokens, cost and time of asking `model`; nothing is asked.

    Args:
        model: what it says of its `sampling`, `price`, `concurrency` and `usage` is used; replies
            in a `CachedChatModel` cost nothing.
        conversations, seed, cache_as: as for the call.
        seconds_per_call: how long one call takes; None takes the mean of those made so far.
    """
    missing = list(conversations)
    inner: Any = model
    if isinstance(model, CachedChatModel):
        inner = model.model
        keys = model.keys(conversations, seed, cache_as)
        first = {key: c for key, c in zip(keys, conversations, strict=True) if key not in model.log}
        missing = list(first.values())
    sampling: Sampling | None = getattr(inner, "sampling", None)
    price: Price | None = getattr(inner, "price", None)
    usage: Usage | None = getattr(inner, "usage", None)
    if seconds_per_call is None and usage is not None and usage.calls:
        seconds_per_call = usage.seconds / usage.calls
    prompt_tokens = estimate_tokens(missing)
    reply_tokens = len(missing) * (sampling.max_tokens if sampling else 0)
    seconds = None
    if seconds_per_call is not None:
        seconds = seconds_per_call * len(missing) / getattr(inner, "concurrency", 1)
    return Estimate(
        len(missing),
        len(conversations) - len(missing),
        prompt_tokens,
        reply_tokens,
        None if price is None else price.of(prompt_tokens, reply_tokens),
        seconds,
    )
