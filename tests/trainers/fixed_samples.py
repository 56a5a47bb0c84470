"""Completions that are the same for every trainer: drawn from the prompt and how often it came."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

END = 2  # <|im_end|> of the test tokenizer
FIRST_BYTE = 3


class FixedSamples:
    """A source of random completions of 3 to 12 tokens; one in three has no end token."""

    def __init__(self, vocab_size: int, max_length: int = 12) -> None:
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._seen: Counter[tuple[int, ...]] = Counter()

    def complete(self, prompt_ids: list[int]) -> list[int]:
        key = tuple(int(i) for i in prompt_ids)
        self._seen[key] += 1
        chance = random.Random(f"{key}{self._seen[key]}")
        is_cut = chance.random() < 1 / 3
        length = self._max_length if is_cut else chance.randint(3, self._max_length)
        ids = [chance.randrange(FIRST_BYTE, self._vocab_size) for _ in range(length)]
        return ids if is_cut else [*ids[:-1], END]

    def grouped(self, trainer_class: type[Any], **overrides: Any) -> type[Any]:
        """A GRPO or RLOO trainer class that samples from here."""
        gives_logps = "GRPO" in trainer_class.__name__

        def single_turn(trainer: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            completion_ids = [self.complete(ids) for ids in prompt_ids]
            return (completion_ids, None) if gives_logps else completion_ids

        members = {"_generate_single_turn": single_turn, "__module__": trainer_class.__module__}
        return type(trainer_class.__name__, (trainer_class,), members | overrides)


def uneven_reward(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that differs within a group."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(text.encode()) % 17 / 4 + len(text) % 3 for text in texts]
