"""Binary classifier optimisation on pairs (Jung 2024, arXiv 2404.04656, section 4), reward shift 0.

With r = β (log π(y|x) − log π_ref(y|x)):

    loss = −log σ(r_w) − log σ(−r_l)

An upper bound of the DPO loss: −log σ(r_w − r_l) ≤ −log σ(r_w) − log σ(−r_l).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import require_positive
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def bco_pair_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """BCO per pair.

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
    loss = -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["bco_pair_loss"]
