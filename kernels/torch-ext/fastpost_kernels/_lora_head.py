"""A LoRA adapter on the language-model head, and its side of a chunk of rows.

    y = h W^T + s (h A^T) B^T + b

The adapter widens the inner dimension of every GEMM of the head from H to H + r, without a copy of
W beside B: u = s h A^T is computed once per row, and a second GEMM adds u B^T to the tile of h W^T.
Legend: m rows of a chunk, H hidden, V vocabulary, r rank.
Source: Hu et al., "LoRA" (arXiv:2106.09685, equation 3).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["LoraHead", "LowRankRows"]


class LoraHead(NamedTuple):
    """The adapter as PEFT stores it: `lora_A.weight`, `lora_B.weight` and `scaling`."""

    a: Tensor  # [r, H]
    b: Tensor  # [V, r]
    scale: float = 1.0


class LowRankRows(NamedTuple):
    """u = s h A^T of one chunk of rows, and what a frozen head's fold sums of B."""

    exact: Tensor  # [m, r], dtype of the statistics
    factor: Tensor  # [m, r], the same as the GEMMs multiply it
    acc: Tensor | None  # [m, r]: receives sum_v exp(z_v - ref) slope_v B_v
