"""Noise contrastive alignment on pairs (Chen 2024, arXiv 2402.05369, section 4.1).

With r = β (log π(y|x) − log π_ref(y|x)):

    loss = −log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l)

Each reward is pulled to an absolute value, so that the chosen likelihood does not sink.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import require_positive
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def nca_pair_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """NCA per pair.

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
    loss = (
        -F.logsigmoid(beta * chosen)
        - 0.5 * F.logsigmoid(-beta * chosen)
        - 0.5 * F.logsigmoid(-beta * rejected)
    )
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["nca_pair_loss"]
