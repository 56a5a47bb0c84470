"""Decoupled clip and dynamic sampling policy optimisation (Yu 2025, arXiv 2503.14476, eq. 8).

    loss = 1/N Σ_i Σ_t [−min(ρ_it A_i, clip(ρ_it, 1 − ε_low, 1 + ε_high) A_i) + β k3_it]
    A_i = (r_i − mean r) / std r over the group: `group_advantages`

N counts the scored tokens of the whole accumulated batch, so all tokens weigh the same; ε_high
above ε_low leaves room for unlikely tokens to grow. The paper has β = 0. Legend: B completions, T
tokens.
"""

from __future__ import annotations

from torch import Tensor

from fastpost.losses.clipped_surrogate import PolicyLoss, clipped_token_loss
from fastpost.losses.sequence import token_mean


def dapo_loss(
    policy_logps: Tensor,  # [B, T]
    old_logps: Tensor,  # [B, T]
    advantages: Tensor,  # [B]
    response_mask: Tensor,  # [B, T] bool
    *,
    num_items: int | Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    ref_logps: Tensor | None = None,  # [B, T]
    beta: float = 0.0,
) -> PolicyLoss:
    """DAPO: sum over all tokens, over their number.

    Args:
        old_logps: of the policy that sampled; `policy_logps.detach()` in the first epoch.
        num_items: N, scored tokens of the accumulated batch over all ranks; None: of this batch.
        epsilon_low: 1 − ε_low is the smallest ratio that still teaches, 0 to 1.
        epsilon_high: 1 + ε_high is the largest, > 0.
        ref_logps: the reference's log-probs, given exactly when β > 0.
        beta: weight β of the KL, ≥ 0.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: a hyperparameter out of range, or shapes that do not fit.
    """
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
    return terms._replace(loss=token_mean(terms.loss, response_mask, num_items))


__all__ = ["dapo_loss"]
