"""What all losses over preference pairs share: log-ratios in, a loss and two rewards out.

    u_w = log π(y_w|x) − log π_ref(y_w|x)     reward of the chosen answer: β u_w
    u_l = log π(y_l|x) − log π_ref(y_l|x)     reward of the rejected answer: β u_l

(Rafailov 2023, arXiv 2305.18290, eq. 5 without the prompt's constant.) Legend: P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpost.losses.arguments import require_same_shape
from fastpost.losses.sequence import full_precision


class PreferenceLoss(NamedTuple):
    """A loss per pair, not reduced: take its mean, weight it, or add another loss to it first.

    Attributes:
        loss: `[P]`, differentiable.
        rewards_chosen: `[P]`, detached.
        rewards_rejected: `[P]`, detached.
    """

    loss: Tensor
    rewards_chosen: Tensor
    rewards_rejected: Tensor


def preference_logratios(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
) -> tuple[Tensor, Tensor]:
    """`(u_w [P], u_l [P])`, at least fp32. The reference receives no gradient.

    Raises:
        ValueError: the four shapes differ.
    """
    require_same_shape(
        policy_chosen_seq_logps=policy_chosen_seq_logps,
        policy_rejected_seq_logps=policy_rejected_seq_logps,
        ref_chosen_seq_logps=ref_chosen_seq_logps,
        ref_rejected_seq_logps=ref_rejected_seq_logps,
    )
    chosen = full_precision(policy_chosen_seq_logps) - full_precision(ref_chosen_seq_logps.detach())
    rejected = full_precision(policy_rejected_seq_logps) - full_precision(
        ref_rejected_seq_logps.detach()
    )
    return chosen, rejected


def preference_loss(
    loss: Tensor,  # [P]
    chosen: Tensor,  # [P] log-ratios
    rejected: Tensor,  # [P] log-ratios
    beta: float,
) -> PreferenceLoss:
    """The loss beside the implicit rewards β u_w and β u_l."""
    return PreferenceLoss(loss, beta * chosen.detach(), beta * rejected.detach())


__all__ = ["PreferenceLoss", "preference_logratios", "preference_loss"]
