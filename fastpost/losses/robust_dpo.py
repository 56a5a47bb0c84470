"""Robust DPO (Chowdhury 2024, arXiv 2403.00409, section 3.1): unbiased under swapped labels.

With ε the probability that a label is swapped and z = β (u_w − u_l):

    loss = [−(1 − ε) log σ(z) + ε log σ(−z)] / (1 − 2ε)

Averaged over the noise this is the DPO loss of the clean labels; it may be negative.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import require_positive
from fastpost.losses.f_divergence import Score, reverse_kl_score
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def robust_dpo_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    score: Score = reverse_kl_score,
) -> PreferenceLoss:
    """Robust DPO per pair.

    Args:
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability ε of a swapped label, 0 ≤ ε < 0.5.
        score: f-divergence, see `f_divergence`.

    Raises:
        ValueError: a hyperparameter out of range (at ε = 0.5 labels say nothing), or shapes that
            differ.
    """
    require_positive("beta", beta, "0.1")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing} was given, expected 0 <= label_smoothing < 0.5; "
            "pass 0.1"
        )
    chosen, rejected = preference_logratios(
        policy_chosen_seq_logps,
        policy_rejected_seq_logps,
        ref_chosen_seq_logps,
        ref_rejected_seq_logps,
    )
    margin = beta * (score(chosen) - score(rejected))
    clean = -(1 - label_smoothing) * F.logsigmoid(margin)
    swapped = -label_smoothing * F.logsigmoid(-margin)
    loss = (clean - swapped) / (1 - 2 * label_smoothing)
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["robust_dpo_loss"]
