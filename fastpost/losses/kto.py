"""Kahneman-Tversky optimisation on labelled answers (Ethayarajh 2024, arXiv 2402.01306, eq. 7).

With r = log π(y|x) − log π_ref(y|x) and a reference point z₀ ≥ 0, the KL of policy and reference:

    desirable     loss = λ_D (1 − σ(β (r − z₀)))
    undesirable   loss = λ_U (1 − σ(β (z₀ − r)))
    z₀ = max(0, mean over a batch of log π(y'|x) − log π_ref(y'|x)), y' the answer to another prompt

`apo_zero_unpaired_loss` is the same with z₀ = 0 (D'Oosterlinck 2024, arXiv 2408.06266, eq. 7).
Legend: B answers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.losses.arguments import require_mask, require_positive, require_same_shape
from fastpost.losses.sequence import full_precision


class UnpairedLoss(NamedTuple):
    """A loss per answer, in the order given.

    Attributes:
        loss: `[B]`, differentiable; its mean over all answers, good and bad, is the objective.
        rewards: `[B]`, β r, detached.
    """

    loss: Tensor
    rewards: Tensor


def kto_reference_point(
    policy_mismatched_seq_logps: Tensor,  # [B] log-probs of answers to other prompts
    ref_mismatched_seq_logps: Tensor,  # [B]
) -> Tensor:
    """`[]`: z₀, without gradient; 0 for no answers.

    With several ranks gather both first: the cut at 0 belongs to the global mean.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(
        policy_mismatched_seq_logps=policy_mismatched_seq_logps,
        ref_mismatched_seq_logps=ref_mismatched_seq_logps,
    )
    logratios = full_precision(policy_mismatched_seq_logps) - full_precision(
        ref_mismatched_seq_logps
    )
    return (logratios.detach().sum() / max(1, logratios.numel())).clamp(min=0)


def kto_loss(
    policy_seq_logps: Tensor,  # [B]
    ref_seq_logps: Tensor,  # [B]
    is_desirable: Tensor,  # [B] bool
    reference_point: Tensor,  # [] from kto_reference_point
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """KTO per answer.

    Args:
        beta: risk aversion, > 0.
        desirable_weight: λ_D > 0. Keep λ_D n_D / (λ_U n_U) between 1 and 1.33, as the paper
            advises.
        undesirable_weight: λ_U > 0.

    Raises:
        TypeError: `is_desirable` is not boolean.
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("beta", beta, "0.1")
    require_positive("desirable_weight", desirable_weight, "1.0")
    require_positive("undesirable_weight", undesirable_weight, "1.0")
    require_mask(is_desirable, "is_desirable")
    require_same_shape(
        policy_seq_logps=policy_seq_logps, ref_seq_logps=ref_seq_logps, is_desirable=is_desirable
    )
    logratios = full_precision(policy_seq_logps) - full_precision(ref_seq_logps.detach())
    # 1 − σ(v) = σ(−v), exact where v is large
    distance = beta * (logratios - reference_point.detach())
    loss = torch.where(
        is_desirable,
        desirable_weight * torch.sigmoid(-distance),
        undesirable_weight * torch.sigmoid(distance),
    )
    return UnpairedLoss(loss, beta * logratios.detach())


def apo_zero_unpaired_loss(
    policy_seq_logps: Tensor,  # [B]
    ref_seq_logps: Tensor,  # [B]
    is_desirable: Tensor,  # [B] bool
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """APO-zero per answer: KTO anchored at z₀ = 0; arguments and errors as in `kto_loss`."""
    return kto_loss(
        policy_seq_logps,
        ref_seq_logps,
        is_desirable,
        torch.zeros((), device=policy_seq_logps.device),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


__all__ = ["UnpairedLoss", "apo_zero_unpaired_loss", "kto_loss", "kto_reference_point"]
