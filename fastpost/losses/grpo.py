"""Group relative policy optimisation (Shao 2024, arXiv 2402.03300, eq. 3).

    loss = 1/B Σ_i 1/|y_i| Σ_t [−min(ρ_it A_i, clip(ρ_it, 1 − ε, 1 + ε) A_i) + β k3_it]
    A_i = (r_i − mean r) / std r over the G completions of a prompt: `group_advantages`

Every completion weighs the same whatever its length, so a token of a long one weighs less: see
`dr_grpo` and `dapo`. Legend: B completions, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from fastpost.losses.clipped_surrogate import PolicyLoss, clipped_token_loss
from fastpost.losses.sequence import seq_mean


def grpo_loss(
    policy_logps: Tensor,  # [B, T]
    old_logps: Tensor,  # [B, T]
    advantages: Tensor,  # [B]
    response_mask: Tensor,  # [B, T] bool
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    ref_logps: Tensor | None = None,  # [B, T]
    beta: float = 0.0,
) -> PolicyLoss:
    """GRPO: mean over completions of the mean over their tokens; an empty one counts 0.

    Args:
        old_logps: of the policy that sampled; `policy_logps.detach()` in the first epoch.
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
    return terms._replace(loss=seq_mean(terms.loss, response_mask).mean())


__all__ = ["grpo_loss"]
