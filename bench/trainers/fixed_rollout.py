"""Rollouts that cost nothing and are the same for both trainers: the update alone is measured.

Each prompt's completions are prepared beforehand: solutions whose numbers go wrong from some place
on and which stop after some line, so that a group differs in content and length as samples do.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from typing import Any

import torch

from fastpost.rollout.interface import Completions


class FixedRollout:
    """Completions by prompt.

    Args:
        rows: rows with `prompt` (conversation) and `solution` (text).
        tokenizer: the trainer's tokenizer.
        num_completions: completions of each prompt.
    """

    def __init__(self, rows: Any, tokenizer: Any, num_completions: int) -> None:
        chance = random.Random(5)
        self.pad_token_id = tokenizer.pad_token_id
        self.completions: dict[tuple[int, ...], list[list[int]]] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}
        for row in rows:
            ids = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            texts = [_vary(row["solution"], chance) for _ in range(num_completions)]
            self.completions[tuple(ids)] = [
                [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                for text in texts
            ]
            self.prompts[row["prompt"][0]["content"]] = tuple(ids)
        self._served: defaultdict[tuple[int, ...], int] = defaultdict(int)

    def next_completion(self, prompt_ids: Any) -> list[int]:
        """The next of the prompt's completions, round and round."""
        key = tuple(prompt_ids)
        self._served[key] += 1
        known = self.completions[key]
        return known[(self._served[key] - 1) % len(known)]

    def generate(self, prompt_ids: list[list[int]]) -> Completions:
        """The interface of `fastpost.rollout`, which PPO samples through."""
        return Completions([self.next_completion(ids) for ids in prompt_ids])

    def grouped(self, trainer_class: type[Any]) -> type[Any]:
        """A GRPO or RLOO trainer that samples from here."""

        def single_turn(trainer: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            return [self.next_completion(ids) for ids in prompt_ids], None

        return type(
            trainer_class.__name__, (trainer_class,), {"_generate_single_turn": single_turn}
        )

    def paired(self, trainer_class: type[Any]) -> type[Any]:
        """An online DPO trainer that samples from here."""

        def generate(trainer: Any, model: Any, prompts: Any, images: Any = None) -> Any:
            keys = [self.prompts[prompt[0]["content"]] for prompt in prompts] * 2
            prompt_ids, prompt_mask = self._pad(keys, left=True)
            answers = [self.next_completion(key) for key in keys]
            completion_ids, completion_mask = self._pad(answers, left=False)
            return prompt_ids, prompt_mask, completion_ids, completion_mask, None

        return type(trainer_class.__name__, (trainer_class,), {"_generate": generate})

    def _pad(self, rows: Any, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            place = slice(width - len(row), None) if left else slice(len(row))
            ids[i, place] = torch.tensor(row)
            mask[i, place] = 1
        return ids, mask


def _vary(solution: str, chance: random.Random) -> str:
    lines = solution.splitlines()
    text = "\n".join(lines[: chance.randint(max(1, len(lines) - 2), len(lines))])
    place, offset = chance.randrange(len(text)), chance.randint(1, 9)
    return text[:place] + re.sub(r"\d+", lambda n: str(int(n[0]) + offset), text[place:])


def reward(completions: Any, **columns: Any) -> list[float]:
    """Any reward that differs within a group does for a measurement."""
    return [float(len(str(completion)) % 11) for completion in completions]


__all__ = ["FixedRollout", "reward"]
