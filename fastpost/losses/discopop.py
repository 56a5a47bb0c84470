"""Discovered preference optimisation, log-ratio modulated loss (Lu 2024, arXiv 2406.08414, eq. 5).

With z = β (u_w − u_l), a blend of the logistic and the exponential loss:

    loss = (1 − σ(z/τ)) (−log σ(z)) + σ(z/τ) e^(−z)

The exponent is cut at 80: there the blend has no weight on it, and inf · 0 would be nan.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import require_positive
from fastpost.losses.f_divergence import MAX_EXPONENT, Score, reverse_kl_score
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def discopop_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    score: Score = reverse_kl_score,
) -> PreferenceLoss:
    """DiscoPOP per pair.

    Args:
        beta: strength of the pull to the reference, > 0.
        discopop_tau: temperature τ of the blend, > 0; the paper uses 0.05.
        score: f-divergence, see `f_divergence`.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("beta", beta, "0.1")
    require_positive("discopop_tau", discopop_tau, "0.05")
    chosen, rejected = preference_logratios(
        policy_chosen_seq_logps,
        policy_rejected_seq_logps,
        ref_chosen_seq_logps,
        ref_rejected_seq_logps,
    )
    margin = beta * (score(chosen) - score(rejected))
    blend = torch.sigmoid(margin / discopop_tau)
    exponential = torch.exp((-margin).clamp(max=MAX_EXPONENT))
    loss = -F.logsigmoid(margin) * (1 - blend) + exponential * blend
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["discopop_loss"]
