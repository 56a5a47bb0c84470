"""GRPO done right (Liu 2025, arXiv 2503.20783, section 3.2): no bias by length or difficulty.

    loss = 1/(B L) Σ_i Σ_t [−min(ρ_it A_i, clip(ρ_it, 1 − ε, 1 + ε) A_i) + β k3_it]
    A_i = r_i − mean r over the group, without the division by std: `centred_advantages`

L is a constant, the largest completion length, instead of |y_i|. Legend: B completions, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from fastpost.losses.arguments import require_positive
from fastpost.losses.clipped_surrogate import PolicyLoss, clipped_token_loss


def dr_grpo_loss(
    policy_logps: Tensor,  # [B, T]
    old_logps: Tensor,  # [B, T]
    advantages: Tensor,  # [B]
    response_mask: Tensor,  # [B, T] bool
    *,
    max_completion_length: int,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    ref_logps: Tensor | None = None,  # [B, T]
    beta: float = 0.0,
) -> PolicyLoss:
    """Dr. GRPO: sum over all tokens, over a constant.

    Args:
        old_logps: of the policy that sampled; `policy_logps.detach()` in the first epoch.
        max_completion_length: L in tokens, > 0; the same for all batches.
        epsilon_low: 1 − ε_low is the smallest ratio that still teaches, 0 to 1.
        epsilon_high: 1 + ε_high is the largest, > 0.
        ref_logps: the reference's log-probs, given exactly when β > 0.
        beta: weight β of the KL, ≥ 0.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: a hyperparameter out of range, or shapes that do not fit.
    """
    require_positive(
        "max_completion_length", max_completion_length, "the length at which generation stops"
    )
    terms = clipped_token_loss(
        policy_logps,
        old_logps,
        advantages,
        response_mask,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        ref_logps=ref_logps,
        beta=beta,
    )
    return terms._replace(loss=terms.loss.sum() / (terms.loss.shape[0] * max_completion_length))


__all__ = ["dr_grpo_loss"]
