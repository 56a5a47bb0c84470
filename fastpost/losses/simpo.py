"""Simple preference optimisation (Meng 2024, arXiv 2405.14734, eq. 6).

    loss = −log σ(β (r̄_w − r̄_l) − γ),    r̄ = mean token log-prob of the answer

No reference model. With label smoothing ε, as TRL has it:

    loss = −(1 − ε) log σ(z) − ε log σ(−z),    z = β (r̄_w − r̄_l) − γ
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import (
    require_between,
    require_nonnegative,
    require_positive,
    require_same_shape,
)
from fastpost.losses.preference import PreferenceLoss, preference_loss
from fastpost.losses.sequence import full_precision


def simpo_loss(
    policy_chosen_mean_logps: Tensor,  # [P] mean over scored tokens
    policy_rejected_mean_logps: Tensor,  # [P]
    *,
    beta: float = 2.0,
    simpo_gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """SimPO per pair; the rewards are β times the mean log-prob.

    Args:
        beta: scale of the reward, > 0; the paper uses 2.0 to 2.5.
        simpo_gamma: target margin γ ≥ 0 in units of the scaled reward; about β/2 in the paper.
        label_smoothing: probability ε of a swapped label, 0 to 0.5.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("beta", beta, "2.0")
    require_nonnegative("simpo_gamma", simpo_gamma, "1.0")
    require_between("label_smoothing", label_smoothing, 0.0, 0.5, "0.0")
    require_same_shape(
        policy_chosen_mean_logps=policy_chosen_mean_logps,
        policy_rejected_mean_logps=policy_rejected_mean_logps,
    )
    chosen = full_precision(policy_chosen_mean_logps)
    rejected = full_precision(policy_rejected_mean_logps)
    margin = beta * (chosen - rejected) - simpo_gamma
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["simpo_loss"]
