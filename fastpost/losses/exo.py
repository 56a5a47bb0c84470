"""Efficient exact optimisation on pairs, EXO-pref (Ji 2024, arXiv 2402.00856, eq. 16).

KL from the policy's distribution over the two answers to the label's, with z = β (u_w − u_l):

    loss = σ(z) [log σ(z) − log(1 − ε)] + σ(−z) [log σ(−z) − log ε]

Zero where σ(z) = 1 − ε: ε > 0 is what keeps the optimum finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import require_between, require_positive
from fastpost.losses.f_divergence import Score, reverse_kl_score
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def exo_pair_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    score: Score = reverse_kl_score,
) -> PreferenceLoss:
    """EXO-pref per pair.

    Args:
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability ε of a swapped label, 1e-12 to 0.5; the paper uses 1e-3.
        score: f-divergence, see `f_divergence`.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("beta", beta, "0.1")
    require_between("label_smoothing", label_smoothing, 1e-12, 0.5, "1e-3")
    chosen, rejected = preference_logratios(
        policy_chosen_seq_logps,
        policy_rejected_seq_logps,
        ref_chosen_seq_logps,
        ref_rejected_seq_logps,
    )
    margin = beta * (score(chosen) - score(rejected))
    wins = F.logsigmoid(margin)
    loses = F.logsigmoid(-margin)
    loss = torch.sigmoid(margin) * (wins - math.log1p(-label_smoothing))
    loss = loss + torch.sigmoid(-margin) * (loses - math.log(label_smoothing))
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["exo_pair_loss"]
