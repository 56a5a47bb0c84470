"""From per-token values to one number per sequence or batch, over scored tokens only.

    seq_sum   Σ_t m_t v_t                      the sequence's log-prob
    seq_mean  Σ_t m_t v_t / max(1, Σ_t m_t)    length-normalised
    token_mean  Σ_bt m v / max(1, N)           N = scored tokens, or the number given

A sequence without a scored token gives 0 with gradient 0. Unscored places are selected away, not
multiplied by zero, so that padding may hold nan or inf. Half precision is widened to fp32: at a
log-prob of −300 neighbouring bf16 numbers are 2 apart. Legend: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.losses.arguments import require_mask, require_same_shape


def full_precision(values: Tensor) -> Tensor:
    """`values` in fp32 if they were in half precision, else unchanged."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def scored(values: Tensor, response_mask: Tensor) -> Tensor:
    """`values` at scored places and 0 elsewhere, at least fp32.

    Args:
        values: `[B, T]` floating.
        response_mask: `[B, T]` bool, True = scored.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the shapes differ.
    """
    require_mask(response_mask)
    require_same_shape(values=values, response_mask=response_mask)
    return full_precision(values).masked_fill(~response_mask, 0.0)


def seq_sum(values: Tensor, response_mask: Tensor) -> Tensor:
    """`[B]`: sum over the scored tokens of each row of `values [B, T]`."""
    return scored(values, response_mask).sum(dim=-1)


def seq_mean(values: Tensor, response_mask: Tensor) -> Tensor:
    """`[B]`: mean over the scored tokens of each row of `values [B, T]`, 0 where there is none."""
    return seq_sum(values, response_mask) / response_mask.sum(dim=-1).clamp(min=1)


def token_mean(
    values: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T] bool
    num_items: int | Tensor | None = None,  # scored tokens of the accumulated batch, all ranks
) -> Tensor:
    """`[]`: sum over all scored tokens, over their number or `num_items`, at least 1.

    With gradient accumulation or several ranks the denominator must be the global count, else
    short micro-batches weigh too much: that is what `num_items` is for.
    """
    if num_items is None:
        num_items = response_mask.sum()
    return scored(values, response_mask).sum() / torch.as_tensor(num_items).clamp(min=1)


__all__ = ["full_precision", "scored", "seq_mean", "seq_sum", "token_mean"]
