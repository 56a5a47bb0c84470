"""The worst batch of a plan: every row full, every token of an answer scored."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.planning.request import Request

__all__ = ["worst_batch"]

IGNORE_INDEX = -100
_FIRST = 1  # 0 stands for padding


def worst_batch(request: Request, vocab: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels`, each int64 `[B, seq]`.

    Rows differ from their first token on, apart from what a method makes them share: both answers
    of a pair their prompt, completions of a group theirs. Chosen rows come before rejected ones.
    """
    generator = torch.Generator().manual_seed(0)
    num_prompt = request.num_prompt

    def draw(rows: int, width: int) -> Tensor:
        return torch.randint(_FIRST, vocab, (rows, width), generator=generator)

    if request.is_pairs:
        prompts = draw(request.rows, num_prompt).repeat(2, 1)
    elif request.samples:
        num_prompts = -(-request.rows // request.group)
        prompts = draw(num_prompts, num_prompt).repeat_interleave(request.group, 0)
        prompts = prompts[: request.rows]
    else:
        prompts = draw(request.rows, num_prompt)
    ids = torch.cat([prompts, draw(len(prompts), request.seq - num_prompt)], 1)
    labels = ids.clone()
    labels[:, :num_prompt] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
