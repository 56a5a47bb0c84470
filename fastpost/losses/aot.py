"""Alignment via optimal transport (Melnyk 2024, arXiv 2406.05882, section 3): rank against rank.

The distribution of the policy's margins over a batch should dominate the reference's. In one
dimension optimal transport pairs equal ranks, so both sides are sorted and the DPO loss with label
smoothing ε is applied to the differences d:

    paired     d = sort(log π(y_w) − log π(y_l)) − sort(log π_ref(y_w) − log π_ref(y_l))
    unpaired   d = sort(log π(y_w) − log π_ref(y_w)) − sort(log π(y_l) − log π_ref(y_l))
    loss = −(1 − ε) log σ(β d) − ε log σ(−β d)

An entry of the loss belongs to a rank, not to a pair: only its mean has a meaning.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import require_between, require_positive
from fastpost.losses.preference import PreferenceLoss, preference_logratios, preference_loss
from fastpost.losses.sequence import full_precision


def _rank_loss(difference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    require_positive("beta", beta, "0.1")
    require_between("label_smoothing", label_smoothing, 0.0, 0.5, "0.0")
    margin = beta * difference
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def aot_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """AOT per rank, for paired data; rewards are per pair as in DPO.

    Args:
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability ε of a swapped label, 0 to 0.5.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    chosen, rejected = preference_logratios(
        policy_chosen_seq_logps,
        policy_rejected_seq_logps,
        ref_chosen_seq_logps,
        ref_rejected_seq_logps,
    )
    policy = full_precision(policy_chosen_seq_logps) - full_precision(policy_rejected_seq_logps)
    ref = full_precision(ref_chosen_seq_logps) - full_precision(ref_rejected_seq_logps)
    difference = policy.sort(dim=0).values - ref.detach().sort(dim=0).values
    loss = _rank_loss(difference, beta, label_smoothing)
    return preference_loss(loss, chosen, rejected, beta)


def aot_unpaired_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    ref_chosen_seq_logps: Tensor,  # [P]
    ref_rejected_seq_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """AOT per rank, for chosen and rejected answers that need not share prompts.

    Args:
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability ε of a swapped label, 0 to 0.5.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    chosen, rejected = preference_logratios(
        policy_chosen_seq_logps,
        policy_rejected_seq_logps,
        ref_chosen_seq_logps,
        ref_rejected_seq_logps,
    )
    difference = chosen.sort(dim=0).values - rejected.sort(dim=0).values
    loss = _rank_loss(difference, beta, label_smoothing)
    return preference_loss(loss, chosen, rejected, beta)


__all__ = ["aot_loss", "aot_unpaired_loss"]
