"""Reward model from pairs: Bradley-Terry with margin and centring.

    loss = −log σ(r(x, y_w) − r(x, y_l) − m) + c (r(x, y_w) + r(x, y_l))²

Bradley-Terry: Ouyang 2022, arXiv 2203.02155, eq. 1. Margin m by how much better the chosen answer
was judged: Touvron 2023, arXiv 2307.09288, eq. 2. Centring c, which fixes the free constant of the
rewards: Eisenstein 2023, arXiv 2312.09244, section 2. Legend: P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import require_nonnegative, require_same_shape
from fastpost.losses.sequence import full_precision


class BradleyTerryLoss(NamedTuple):
    """Loss and metrics per pair.

    Attributes:
        loss: `[P]`, differentiable, not reduced.
        reward_margin: `[P]`, r(y_w) − r(y_l), detached; its share above 0 is the accuracy.
    """

    loss: Tensor
    reward_margin: Tensor


def bradley_terry_loss(
    rewards_chosen: Tensor,  # [P]
    rewards_rejected: Tensor,  # [P]
    margin: Tensor | None = None,  # [P]
    *,
    center_rewards_coefficient: float = 0.0,
) -> BradleyTerryLoss:
    """Bradley-Terry per pair.

    Args:
        margin: difference of rewards asked for beyond 0, per pair; None for 0.
        center_rewards_coefficient: c ≥ 0; 0.01 is customary, 0 leaves rewards uncentred.

    Raises:
        ValueError: the coefficient is negative, or shapes differ (`[P, 1]` would broadcast).
    """
    require_nonnegative("center_rewards_coefficient", center_rewards_coefficient, "0.0 or 0.01")
    require_same_shape(rewards_chosen=rewards_chosen, rewards_rejected=rewards_rejected)
    chosen, rejected = full_precision(rewards_chosen), full_precision(rewards_rejected)
    difference = chosen - rejected
    asked = difference
    if margin is not None:
        require_same_shape(rewards_chosen=rewards_chosen, margin=margin)
        asked = difference - full_precision(margin)
    loss = -F.logsigmoid(asked)
    loss = loss + center_rewards_coefficient * (chosen + rejected).square()
    return BradleyTerryLoss(loss, difference.detach())


__all__ = ["BradleyTerryLoss", "bradley_terry_loss"]
