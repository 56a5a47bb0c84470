"""Entropy of the next-token distribution, and its mean over scored tokens as a bonus.

    H_t = −Σ_v p_v log p_v = logsumexp(z) − Σ_v p_v z_v,    p = softmax(z)

An objective with an entropy bonus c is `loss − c · mean_entropy(...)` (Schulman 2017, arXiv
1707.06347, eq. 9). Where the head is fused and no logits exist, the kernel gives H_t itself.
Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.losses.sequence import full_precision, token_mean


def token_entropy(logits: Tensor) -> Tensor:
    """`[..., V]` → `[...]`, in nats. A logit of −inf has probability 0 and adds nothing."""
    logps = torch.log_softmax(full_precision(logits), dim=-1)
    # where p = 0 the product is 0 · −inf: selected away on the way in, so the gradient is 0 too
    finite = logps.masked_fill(logps.isneginf(), 0.0)
    return -(logps.exp() * finite).sum(dim=-1)


def mean_entropy(
    entropies: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T] bool
    num_items: int | Tensor | None = None,
) -> Tensor:
    """`[]`: mean entropy of the scored tokens in nats, 0 where there is none.

    Args:
        num_items: scored tokens of the accumulated batch over all ranks; None: of this batch.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the shapes differ.
    """
    return token_mean(entropies, response_mask, num_items)


__all__ = ["mean_entropy", "token_entropy"]
