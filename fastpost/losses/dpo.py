"""Direct preference optimisation (Rafailov 2023, arXiv 2305.18290, eq. 7).

    loss = −log σ(β (u_w − u_l)),    u = log π(y|x) − log π_ref(y|x)

With label smoothing ε the labels are wrong with probability ε (conservative DPO, Mitchell 2023,
"A note on DPO with noisy preferences & relationship to IPO", eq. 3):

    loss = −(1 − ε) log σ(β (u_w − u_l)) − ε log σ(−β (u_w − u_l))
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import require_between, require_positive
from fastpost.losses.f_divergence import Score, reverse_kl_score
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def dpo_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    score: Score = reverse_kl_score,
) -> PreferenceLoss:
    """DPO per pair, from sequence log-probs (sums over scored tokens).

    Args:
        beta: strength of the pull to the reference, > 0, usually 0.1 to 0.3.
        label_smoothing: probability ε of a swapped label, 0 to 0.5.
        score: f-divergence, see `f_divergence`.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("beta", beta, "0.1")
    require_between("label_smoothing", label_smoothing, 0.0, 0.5, "0.0")
    chosen, rejected = preference_logratios(
        policy_chosen_seq_logps,
        policy_rejected_seq_logps,
        ref_chosen_seq_logps,
        ref_rejected_seq_logps,
    )
    margin = beta * (score(chosen) - score(rejected))
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["dpo_loss"]
