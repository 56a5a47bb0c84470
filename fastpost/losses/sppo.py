"""Self-play preference optimisation, hard labels (Wu 2024, arXiv 2405.00675, eq. 4.7).

The win probability is 1 for the chosen and 0 for the rejected answer, η = 1/β:

    loss = (u_w − 1/(2β))² + (u_l + 1/(2β))²,    u = log π(y|x) − log π_ref(y|x)
"""

from __future__ import annotations

from torch import Tensor

from fastpost.losses.arguments import require_positive
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss


def sppo_hard_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """SPPO per pair.

    Args:
        beta: 1/η of the paper, > 0.

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
    loss = (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["sppo_hard_loss"]
