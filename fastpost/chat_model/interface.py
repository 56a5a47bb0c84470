"""What judges, synthesis and alignment loops ask of a model that answers conversations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = [
    "ChatModel",
    "ChoosingModel",
    "Conversation",
    "IdentifiedChatModel",
    "Reply",
    "Sampling",
    "StreamingChatModel",
    "UserTurnModel",
    "ask_each",
    "content_digest",
    "in_order",
    "require_conversation",
]

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How replies are sampled.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: share of probability that is sampled from.
        max_tokens: longest reply in tokens.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise ValueError(f"temperature is {self.temperature}; give a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a share above 0, at most 1")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; give at least 1")

    def as_dict(self) -> dict[str, float | int]:
        """For cache keys and provenance."""
        return asdict(self)


@dataclass(frozen=True)
class Reply:
    """A reply. `is_whole` is False where `max_tokens` cut it off."""

    text: str
    is_whole: bool = True


class ChatModel(Protocol):
    """Answers conversations. Any function of this form is one."""

    def __call__(self, conversations: Sequence[Conversation], *, seed: int) -> Sequence[str | None]:
        """One reply for each conversation, in their order; None where none came after retries.

        Args:
            conversations: messages {"role": ..., "content": ...}; the last one is the user's.
            seed: another seed samples another reply to the same conversation.
        """
        ...


@runtime_checkable
class IdentifiedChatModel(Protocol):
    """A `ChatModel` that says what its replies depend on, which a cache and provenance need."""

    @property
    def identity(self) -> dict[str, Any]:
        """Model and sampling, as JSON can hold them; nothing secret."""
        ...

    def __call__(
        self, conversations: Sequence[Conversation], *, seed: int
    ) -> Sequence[str | None]: ...


@runtime_checkable
class StreamingChatModel(Protocol):
    """A `ChatModel` that hands over each reply as it comes: none is lost to what follows."""

    def stream(
        self, conversations: Sequence[Conversation], *, seed: int
    ) -> Iterator[tuple[int, Reply | None]]:
        """(place of the conversation, its reply), in the order in which they arrive."""
        ...


@runtime_checkable
class UserTurnModel(Protocol):
    """A model that can also speak as the user, which takes the text of its chat template."""

    def stream_user_turns(
        self, conversations: Sequence[Conversation], seeds: Sequence[int]
    ) -> Iterator[tuple[int, Reply | None]]:
        """The user's next message after each conversation, which may be empty.

        Args:
            conversations: a system message or none, and the turns so far; often all alike.
            seeds: one for each: what tells samples of one conversation apart.
        """
        ...


@runtime_checkable
class ChoosingModel(Protocol):
    """A model that can be held to a few replies, which takes its probabilities."""

    def stream_choices(
        self, conversations: Sequence[Conversation], choices: Sequence[str]
    ) -> Iterator[tuple[int, Reply | None]]:
        """The likeliest of `choices` as the reply to each conversation."""
        ...


def ask_each(
    model: ChatModel, conversations: Sequence[Conversation], *, seed: int
) -> Iterator[tuple[int, Reply | None]]:
    """Streams from a model that can; from another, the replies of one call.

    Raises:
        RuntimeError: the model did not return one reply for each conversation.
    """
    if isinstance(model, StreamingChatModel):
        yield from model.stream(conversations, seed=seed)
        return
    replies = model(conversations, seed=seed)
    if len(replies) != len(conversations):
        raise RuntimeError(
            f"the chat model returned {len(replies)} replies for {len(conversations)} "
            "conversations; return one each, None where there is none"
        )
    for place, text in enumerate(replies):
        yield place, None if text is None else Reply(text)


def in_order(found: Iterator[tuple[int, Reply | None]], count: int) -> list[str | None]:
    """The texts of a stream by their places."""
    texts: list[str | None] = [None] * count
    for place, reply in found:
        texts[place] = None if reply is None else reply.text
    return texts


def require_conversation(conversation: Any) -> None:
    """Refuse what is no list of messages.

    Raises:
        ValueError: with what was given.
    """
    is_one = isinstance(conversation, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in conversation
    )
    if not is_one:
        raise ValueError(
            f"a conversation is {str(conversation)[:200]!r}; give a list of messages "
            '{"role": "user", "content": "..."}'
        )


def content_digest(value: Any) -> str:
    """64 hexadecimal digits that name a value JSON can hold, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
