"""A chat model whose replies follow from conversation and seed, which can be killed at any call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastpost.chat_model.interface import Conversation, Reply, content_digest

_WORDS = (
    *("amber", "basket", "candle", "dragon", "ember", "feather", "garden", "harbour", "island"),
    *("jacket", "kettle", "lantern", "meadow", "needle", "orchard", "pebble", "quarry", "ribbon"),
    *("saddle", "timber", "umbrella", "velvet", "window", "yellow", "zephyr"),
)


class Killed(Exception):
    """What stands for the end of the process."""


def sentence(*parts: Any, length: int = 12) -> str:
    """Words that follow from `parts`; others make other words."""
    digits = content_digest(list(parts))
    return " ".join(_WORDS[int(digits[2 * i : 2 * i + 2], 16) % len(_WORDS)] for i in range(length))


class FakeTeacher:
    """Lists questions when asked for them, answers everything else, and speaks as the user.

    Args:
        killed_at: raises at the call of this number.
        say: replaces the answer to a text; a `Reply`, or None for no reply.
    """

    def __init__(
        self,
        killed_at: int | None = None,
        say: Callable[[str, int], Reply | None] | None = None,
    ) -> None:
        self.identity = {"model": "fake", "temperature": 1.0}
        self.killed_at = killed_at
        self.say = say
        self.calls: list[tuple[str, int]] = []

    def __call__(self, conversations: Sequence[Conversation], *, seed: int) -> list[str | None]:
        return [reply and reply.text for _, reply in self.stream(conversations, seed=seed)]

    def stream(
        self, conversations: Sequence[Conversation], *, seed: int
    ) -> Iterator[tuple[int, Reply | None]]:
        for place, conversation in enumerate(conversations):
            text = conversation[-1]["content"]
            self._count(text, seed)
            asked = re.match(r"Write (\d+) different .* topic: (.*)\n", text)
            if self.say is not None:
                yield place, self.say(text, seed)
            elif asked is not None:
                numbers = range(int(asked[1]))
                questions = [sentence("question", asked[2], i, seed) + "?" for i in numbers]
                yield place, Reply(json.dumps({"questions": questions}))
            else:
                yield place, Reply(sentence("answer", conversation, seed))

    def stream_user_turns(
        self, conversations: Sequence[Conversation], seeds: Sequence[int]
    ) -> Iterator[tuple[int, Reply | None]]:
        for place, (talk, seed) in enumerate(zip(conversations, seeds, strict=True)):
            self._count("user", seed)
            yield place, Reply(" " + sentence("user", talk, seed) + "?\n")

    def _count(self, text: str, seed: int) -> None:
        if len(self.calls) == self.killed_at:
            raise Killed
        self.calls.append((text, seed))
