"""What layers with a low-rank adapter share, whatever their base weight: seeds and gradients of B.

y = base + s u B^T,   du = s dy B,   dB = s dy^T u        Legend: M rows, N outputs, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_dropout", "rank_gradients"]


def check_dropout(dropout_p: float, seed: int | None) -> int:
    """The seed to draw with, 0 where nothing is drawn.

    Raises:
        ValueError: a probability outside [0, 1), or one above 0 without a seed.
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError(
            f"dropout_p is {dropout_p} but seed is None: pass an integer that changes every step, "
            "as int(torch.randint(2**62, ()))"
        )
    return 0 if seed is None else int(seed)


def rank_gradients(
    grad: Tensor,  # [M, N]
    u: Tensor,  # [M, r]
    b: Tensor,  # [N, r]
    scale: float,
    d_u: Tensor,  # [M, r], receives du
    need_b: bool,
) -> Tensor:
    """dB [N, r] in the dtype of `grad`; without elements where it is not needed."""
    torch.mm(grad, b.to(grad.dtype), out=d_u).mul_(scale)
    if not need_b:
        return grad.new_empty(0)
    # r rows from a small transposed copy; the wide operand stays as it lies
    return (u.t().contiguous() @ grad).mul_(scale).t().contiguous()
