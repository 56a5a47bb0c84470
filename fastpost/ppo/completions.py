"""Sampled completions as tensors, and what a model says of them.

A batch is a dict of tensors, one row per completion, the completions of a prompt side by side:

    input_ids, attention_mask  [B, T]   prompt padded on its left, completion on its right
    response_mask              [B, C]   True at completion tokens; they are the last C columns

All per-token results are `[B, C]`, 0 outside the mask. The forward packs: padding costs nothing,
and prompts that are neighbours are computed once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
Batch = dict[str, Tensor]


class TokenScores(NamedTuple):
    """Of each completion token, `[B, C]`.

    Attributes:
        logps: log-prob of the token.
        values: worth of the prefix before the token; None where no critic was asked.
        entropy: entropy of the distribution the token was drawn from; None if not computed.
    """

    logps: Tensor
    values: Tensor | None
    entropy: Tensor | None


def lay_out(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    pad_token_id: int,
    device: torch.device,
) -> Batch:
    """The batch of these rows.

    Raises:
        ValueError: a prompt without tokens, whose first completion token nothing predicts, or no
            completion token at all.
    """
    if not all(prompt_ids):
        raise ValueError(
            f"prompt {[bool(ids) for ids in prompt_ids].index(False)} of the batch has no token; "
            "drop empty prompts, or use a tokenizer that adds a begin-of-sequence token"
        )
    if not any(completion_ids):
        raise ValueError("every sampled completion is empty; max_completion_length must be >= 1")
    before = max(map(len, prompt_ids))
    behind = max(map(len, completion_ids))
    ids, mask, response = [], [], []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        left, right = before - len(prompt), behind - len(completion)
        ids.append([pad_token_id] * left + prompt + completion + [pad_token_id] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
        response.append([True] * len(completion) + [False] * right)
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "response_mask": torch.tensor(response, device=device),
    }


def token_scores(model: Any, batch: Batch, value_model: Any = None) -> TokenScores:
    """One scored forward of a model that has a `fastpost.scoring.Engine`.

    Args:
        value_model: a classifier with a `fastpost.pooling.PooledEngine`; None takes the values of
            the model's own value head, if its engine was asked for them.
    """
    response_mask = batch["response_mask"]
    width = response_mask.shape[1]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    labels[:, -width:] = batch["input_ids"][:, -width:].masked_fill(~response_mask, IGNORE_INDEX)
    output = model(**inputs, labels=labels, fused_lm_head=True)
    values = output.state_values
    if value_model is not None:
        # the state that predicts a token stands one place before it
        value_mask = torch.zeros_like(labels, dtype=torch.bool)
        value_mask[:, -width - 1 : -1] = response_mask
        logits = value_model(**inputs, value_mask=value_mask).logits
        values = logits[:, :-1, 0].float()
    return TokenScores(
        output.log_probs[:, -width:],
        None if values is None else values[:, -width:],
        None if output.entropy is None else output.entropy[:, -width:],
    )


@torch.no_grad()
def token_scores_in_chunks(
    model: Any, batch: Batch, rows: int, value_model: Any = None
) -> TokenScores:
    """The same without gradient, `rows` completions at a time."""
    chunks = [
        token_scores(model, {k: v[i : i + rows] for k, v in batch.items()}, value_model)
        for i in range(0, batch["input_ids"].shape[0], rows)
    ]
    logps, values, entropy = (
        None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)
    )
    assert logps is not None
    return TokenScores(logps, values, entropy)


__all__ = ["Batch", "TokenScores", "lay_out", "token_scores", "token_scores_in_chunks"]
