"""Anchored preference optimisation (D'Oosterlinck 2024, arXiv 2408.06266, eq. 7 and 8).

With r = β (log π(y|x) − log π_ref(y|x)):

    zero   loss = (1 − σ(r_w)) + σ(r_l)              chosen up, rejected down
    down   loss = σ(r_w) + (1 − σ(r_w − r_l))        both down, rejected further

`zero` is for chosen answers better than the model's own, `down` for worse ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.losses.arguments import require_positive
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def apo_zero_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """APO-zero per pair (eq. 7).

    Args:
        beta: strength of the pull to the reference, > 0.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("beta", beta, "0.1")
    chosen, rejected = preference_logratios(
        policy_chosen_seq_logps,
        policy_rejected_seq_logps,
        ref_chosen_seq_logps,
        ref_rejected_seq_logps,
    )
    loss = torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    return preference_loss(loss, chosen, rejected, beta)


def apo_down_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """APO-down per pair (eq. 8).

    Args:
        beta: strength of the pull to the reference, > 0.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("beta", beta, "0.1")
    chosen, rejected = preference_logratios(
        policy_chosen_seq_logps,
        policy_rejected_seq_logps,
        ref_chosen_seq_logps,
        ref_rejected_seq_logps,
    )
    loss = torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["apo_down_loss", "apo_zero_loss"]
