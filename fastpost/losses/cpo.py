"""Contrastive preference optimisation (Xu 2024, arXiv 2401.08417, eq. 3): DPO, reference uniform.

    loss = −log σ(β (log π(y_w|x) − log π(y_l|x))) + α NLL(y_w|x)

With label smoothing ε the first term becomes −(1 − ε) log σ(z) − ε log σ(−z). Two variants replace
it: hinge, max(0, 1 − z), and IPO on mean log-probs, (r̄_w − r̄_l − 1/(2β))². Legend: P pairs.
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


def _with_likelihood(
    preference: Tensor,  # [P]
    chosen: Tensor,  # [P]
    rejected: Tensor,  # [P]
    chosen_nll: Tensor,  # [] or [P]
    beta: float,
    cpo_alpha: float,
) -> PreferenceLoss:
    """Adds α NLL(y_w); the rewards are β log π."""
    require_nonnegative("cpo_alpha", cpo_alpha, "1.0")
    if chosen_nll.ndim > 0:
        require_same_shape(policy_chosen_seq_logps=chosen, chosen_nll=chosen_nll)
    return preference_loss(preference + cpo_alpha * chosen_nll, chosen, rejected, beta)


def _pair(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    require_positive("beta", beta, "0.1")
    require_same_shape(policy_chosen_logps=chosen, policy_rejected_logps=rejected)
    return full_precision(chosen), full_precision(rejected)


def cpo_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    chosen_nll: Tensor,  # [] for the batch, or [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
) -> PreferenceLoss:
    """CPO per pair; a scalar `chosen_nll` is added to every pair, which leaves the mean right.

    Args:
        chosen_nll: negative log-likelihood per scored token of the chosen answers, see `sft_loss`.
        beta: scale of the margin, > 0.
        label_smoothing: probability ε of a swapped label, 0 to 0.5.
        cpo_alpha: weight α ≥ 0 of the likelihood.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_between("label_smoothing", label_smoothing, 0.0, 0.5, "0.0")
    chosen, rejected = _pair(policy_chosen_seq_logps, policy_rejected_seq_logps, beta)
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return _with_likelihood(loss, chosen, rejected, chosen_nll, beta, cpo_alpha)


def cpo_hinge_loss(
    policy_chosen_seq_logps: Tensor,  # [P]
    policy_rejected_seq_logps: Tensor,  # [P]
    chosen_nll: Tensor,  # [] or [P]
    *,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
) -> PreferenceLoss:
    """Hinge per pair without a reference (SLiC, Zhao 2023, arXiv 2305.10425); see `cpo_loss`."""
    chosen, rejected = _pair(policy_chosen_seq_logps, policy_rejected_seq_logps, beta)
    loss = F.relu(1 - beta * (chosen - rejected))
    return _with_likelihood(loss, chosen, rejected, chosen_nll, beta, cpo_alpha)


def cpo_ipo_loss(
    policy_chosen_mean_logps: Tensor,  # [P] mean over scored tokens
    policy_rejected_mean_logps: Tensor,  # [P]
    chosen_nll: Tensor,  # [] or [P]
    *,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
) -> PreferenceLoss:
    """IPO per pair without a reference (Azar 2023, arXiv 2310.12036, eq. 17); see `cpo_loss`."""
    chosen, rejected = _pair(policy_chosen_mean_logps, policy_rejected_mean_logps, beta)
    loss = (chosen - rejected - 1 / (2 * beta)).square()
    return _with_likelihood(loss, chosen, rejected, chosen_nll, beta, cpo_alpha)


__all__ = ["cpo_hinge_loss", "cpo_ipo_loss", "cpo_loss"]
