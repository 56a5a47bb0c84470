"""What calls to a chat model cost: counted as they happen, estimated before."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastpost.chat_model.interface import Conversation

__all__ = ["Estimate", "Price", "Usage", "estimate_tokens"]

# English text in the vocabularies of today's models; other scripts have fewer.
_CHARACTERS_PER_TOKEN = 4
# What a chat template adds to each message.
_TOKENS_PER_MESSAGE = 4


@dataclass(frozen=True)
class Price:
    """What a million tokens cost, in any one currency."""

    prompt: float = 0.0
    reply: float = 0.0

    def of(self, prompt_tokens: int, reply_tokens: int) -> float:
        """The cost of so many tokens."""
        return (self.prompt * prompt_tokens + self.reply * reply_tokens) / 1e6


@dataclass
class Usage:
    """Calls so far. Counting is safe from several threads.

    Attributes:
        calls: requests sent, those tried again counted anew.
        failures: requests that brought no reply.
        prompt_tokens, reply_tokens: as the endpoint reported, or estimated from the characters.
        estimated: replies whose tokens were estimated.
        seconds: sum of the requests' durations.
    """

    calls: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    estimated: int = 0
    seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(
        self,
        *,
        seconds: float,
        prompt_tokens: int = 0,
        reply_tokens: int = 0,
        failed: bool = False,
        estimated: bool = False,
    ) -> None:
        """Counts one request."""
        with self._lock:
            self.calls += 1
            self.failures += failed
            self.prompt_tokens += prompt_tokens
            self.reply_tokens += reply_tokens
            self.estimated += estimated
            self.seconds += seconds


@dataclass(frozen=True)
class Estimate:
    """What calls will cost. `str()` is what a command prints first.

    Attributes:
        calls: those to be made.
        cached: those whose reply is on disk already.
        prompt_tokens: of the calls to be made, from their characters.
        reply_tokens: at most; each call counted with the longest reply.
        cost: at the given price, at most; None without one.
        seconds: None until a duration of a call is known.
    """

    calls: int
    cached: int
    prompt_tokens: int
    reply_tokens: int
    cost: float | None = None
    seconds: float | None = None

    def __add__(self, other: Estimate) -> Estimate:
        """Both, one after the other."""
        both_cost = None if None in (self.cost, other.cost) else self.cost + other.cost  # type: ignore[operator]
        both_time = None if None in (self.seconds, other.seconds) else self.seconds + other.seconds  # type: ignore[operator]
        return Estimate(
            self.calls + other.calls,
            self.cached + other.cached,
            self.prompt_tokens + other.prompt_tokens,
            self.reply_tokens + other.reply_tokens,
            both_cost,
            both_time,
        )

    def __str__(self) -> str:
        parts = [f"{self.calls:,} calls"]
        if self.cached:
            parts[0] += f" ({self.cached:,} more are in the cache)"
        parts.append(f"about {self.prompt_tokens:,} prompt tokens")
        parts.append(f"at most {self.reply_tokens:,} reply tokens")
        if self.cost is not None:
            parts.append(f"at most {self.cost:.2f} at the given price")
        if self.seconds is not None:
            parts.append(f"about {self.seconds / 60:.1f} minutes")
        return ", ".join(parts)


def estimate_tokens(conversations: Sequence[Conversation]) -> int:
    """Tokens of conversations, from their characters."""
    return sum(
        _TOKENS_PER_MESSAGE + -(-len(message["content"]) // _CHARACTERS_PER_TOKEN)
        for conversation in conversations
        for message in conversation
    )
