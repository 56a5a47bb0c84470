"""Length-desensitised DPO (Liu 2024, arXiv 2409.06411): the longer answer's tail counts less.

With l = min(|y_w|, |y_l|) the shared length of a pair, each answer's log-prob becomes

    log π̂(y|x) = Σ_{t ≤ l} log π(y_t) + α Σ_{t > l} log π(y_t)

and the DPO loss follows: apply it to policy and reference alike, then call `dpo_loss`. α = 1 is
DPO, α = 0 drops the tail. Legend: P pairs, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.losses.arguments import require_between
from fastpost.losses.sequence import scored


class LengthDesensitised(NamedTuple):
    """Sequence log-probs with a discounted tail.

    Attributes:
        chosen_seq_logps: `[P]`.
        rejected_seq_logps: `[P]`.
    """

    chosen_seq_logps: Tensor
    rejected_seq_logps: Tensor


def ld_seq_logps(
    chosen_logps: Tensor,  # [P, T]
    rejected_logps: Tensor,  # [P, T'], its own width allowed
    chosen_mask: Tensor,  # [P, T] bool
    rejected_mask: Tensor,  # [P, T'] bool
    *,
    ld_alpha: float,
) -> LengthDesensitised:
    """Sums of token log-probs, those behind the pair's shared length times α.

    Positions are counted among scored tokens, so gaps in a mask do not shift them.

    Args:
        ld_alpha: weight α of the tail, 0 to 1.

    Raises:
        TypeError: a mask is not boolean.
        ValueError: α out of range, or a mask that does not fit its log-probs.
    """
    require_between("ld_alpha", ld_alpha, 0.0, 1.0, "0.5")
    chosen, rejected = scored(chosen_logps, chosen_mask), scored(rejected_logps, rejected_mask)
    shared = torch.minimum(chosen_mask.sum(dim=-1), rejected_mask.sum(dim=-1)).unsqueeze(-1)

    def discounted(logps: Tensor, mask: Tensor) -> Tensor:
        is_tail = mask.cumsum(dim=-1) > shared
        return torch.where(is_tail, ld_alpha * logps, logps).sum(dim=-1)

    return LengthDesensitised(discounted(chosen, chosen_mask), discounted(rejected, rejected_mask))


__all__ = ["LengthDesensitised", "ld_seq_logps"]
