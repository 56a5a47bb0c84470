"""Hinge on the DPO margin (SLiC: Zhao 2023, arXiv 2305.10425, section 2; with a reference as in
RSO: Liu 2023, arXiv 2309.06657).

    loss = max(0, 1 − β (u_w − u_l))
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.losses.arguments import require_positive
from fastpost.losses.f_divergence import Score, reverse_kl_score
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def hinge_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    score: Score = reverse_kl_score,
) -> PreferenceLoss:
    """Hinge per pair; 1/β is the margin in nats at which a pair stops teaching.

    Args:
        beta: reciprocal of the margin, > 0.
        score: f-divergence, see `f_divergence`.

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
    loss = torch.relu(1 - beta * (score(chosen) - score(rejected)))
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["hinge_loss"]
