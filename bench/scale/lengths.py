"""The sequences of a batch, and the batch as TRL's collators lay it out.

Lengths of a preference set are drawn, not read: prompts and answers are log-normal with medians of
128 and 256 tokens and sigmas of 0.8 and 0.6, at least 8 tokens each, cut to TRL's default
`max_length` of 1,024. The shape (short prompts, a long tail, answers about twice as long) is chosen
to be like that of published chat preference sets; it is fitted to none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IGNORE_INDEX", "Row", "as_batch", "preference_rows", "uniform_rows"]

IGNORE_INDEX = -100
MAX_LENGTH = 1024
_PROMPT, _ANSWER = (128, 0.8), (256, 0.6)  # median, sigma
_LEAST = 8


@dataclass(frozen=True)
class Row:
    """Tokens of one sequence; rows of the same `group` begin with the same prompt."""

    group: int
    prompt: int
    answer: int


def preference_rows(method: str, groups: int, size: int, seed: int = 0) -> list[Row]:
    """Sequences of `groups` prompts with `size` answers each, of the lengths stated above.

    Of "dpo" the first answers of all prompts come first, then the second ones, as TRL has them.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(median: int, sigma: float) -> int:
        normal = torch.randn((), generator=generator, dtype=torch.float64)
        return max(_LEAST, int(median * torch.exp(sigma * normal)))

    prompts = [min(draw(*_PROMPT), MAX_LENGTH - _LEAST) for _ in range(groups)]
    rows = [
        Row(group, prompt, min(draw(*_ANSWER), MAX_LENGTH - prompt))
        for group, prompt in enumerate(prompts)
        for _ in range(size)
    ]
    return rows[0::2] + rows[1::2] if method == "dpo" else rows


def uniform_rows(method: str, groups: int, size: int, prompt: int, answer: int) -> list[Row]:
    """Sequences that are all equally long."""
    rows = [Row(group, prompt, answer) for group in range(groups) for _ in range(size)]
    return rows[0::2] + rows[1::2] if method == "dpo" else rows


def as_batch(method: str, rows: list[Row], vocab: int, seed: int = 0) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels`, each int64 `[B, T]`.

    Padded on the right; of "grpo" prompts are padded on the left and completions on the right, each
    to their longest. Labels are those of answers.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts: dict[int, Tensor] = {}
    left = max(row.prompt for row in rows) if method == "grpo" else 0
    width = left + max(row.answer + (0 if left else row.prompt) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for i, row in enumerate(rows):
        if row.group not in prompts:
            prompts[row.group] = torch.randint(1, vocab, (row.prompt,), generator=generator)
        answer = torch.randint(1, vocab, (row.answer,), generator=generator)
        begin = left or row.prompt
        ids[i, begin - row.prompt : begin] = prompts[row.group]
        ids[i, begin : begin + row.answer] = labels[i, begin : begin + row.answer] = answer
        mask[i, begin - row.prompt : begin + row.answer] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
