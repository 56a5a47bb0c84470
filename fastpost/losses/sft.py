"""Supervised fine-tuning on the scored tokens: negative log-likelihood, and its DFT variant.

    SFT   loss = Σ_t m_t · (−log π(y_t | x, y_<t)) / max(1, N)
    DFT   loss = Σ_t m_t · sg[π(y_t)] · (−log π(y_t)) / max(1, N)

N is the number of scored tokens of the accumulated batch over all ranks. DFT (Wu 2025, arXiv
2508.05629, section 3) weights each token by its own detached probability sg[π], which takes the
1/π out of the gradient: unlikely tokens no longer dominate. Legend: B rows, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from fastpost.losses.sequence import scored, token_mean


def sft_loss(
    logps: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T] bool
    num_items: int | Tensor | None = None,
) -> Tensor:
    """`[]`: mean negative log-likelihood of the scored tokens, 0 where there is none.

    Args:
        num_items: scored tokens of the accumulated batch over all ranks; None: of this batch.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the shapes differ.
    """
    return -token_mean(logps, response_mask, num_items)


def dft_loss(
    logps: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T] bool
    num_items: int | Tensor | None = None,
) -> Tensor:
    """`[]`: dynamic fine-tuning; arguments and errors as in `sft_loss`."""
    logps = scored(logps, response_mask)
    return -token_mean(logps * logps.detach().exp(), response_mask, num_items)


__all__ = ["dft_loss", "sft_loss"]
