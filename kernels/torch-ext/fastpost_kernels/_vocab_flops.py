"""FLOPs of the walks over vocabulary tiles, from shapes; M counts all rows as scored.

    one head GEMM                    2 M H V  (+ 2 M r (V + H) with an adapter of rank r)
    d hidden, d weight               2 M H V each
    G B, for d hidden and d A        2 M r V;  then 2 M r H for each of the two
    d B                              2 M r V

Gradient filtering leaves out some of the last four; how much depends on the data, so these are
upper bounds with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["gradient_flops", "head_flops"]


def head_flops(hidden: torch.Size, weight: torch.Size, lora_a: torch.Size | None) -> int:
    """Of the logits, or of a frozen head's gradient."""
    (rows, width), vocab = hidden, weight[0]
    rank = 0 if lora_a is None else lora_a[0]
    return 2 * rows * (width * vocab + rank * (vocab + width))


def gradient_flops(
    hidden: torch.Size, weight: torch.Size, lora_a: torch.Size | None, needs: Sequence[bool]
) -> int:
    """From finished gradient tiles to those of hidden, weight, bias, lora_a, lora_b."""
    (rows, width), vocab = hidden, weight[0]
    rank = 0 if lora_a is None else lora_a[0]
    need_hidden, need_weight, _, need_a, need_b = needs
    full = width * vocab * (need_hidden + need_weight)
    thin = vocab * ((need_hidden or need_a) + need_b) + width * (need_hidden + need_a)
    return 2 * rows * (full + rank * thin)
