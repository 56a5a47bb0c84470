"""REINFORCE leave-one-out (Ahmadian 2024, arXiv 2402.14740, section 3), with PPO's clipping.

    loss = 1/B Σ_i −min(ρ_i A_i, clip(ρ_i, 1 − ε_low, 1 + ε_high) A_i)
    ρ_i = π(y_i|x) / π_old(y_i|x),    log-probs summed over the completion
    A_i = r_i − mean of the rewards of the other G − 1 completions: `leave_one_out_advantages`

The whole completion is one action. In the first epoch, where ρ = 1, the gradient is REINFORCE's,
−A_i ∇log π(y_i|x). The KL belongs into the reward here: r_i − β Σ_t k1_it. Legend: B completions.
"""

from __future__ import annotations

from torch import Tensor

from fastpost.losses.arguments import require_same_shape
from fastpost.losses.clipped_surrogate import PolicyLoss, clipped_surrogate
from fastpost.losses.sequence import full_precision


def rloo_loss(
    policy_seq_logps: Tensor,  # [B] sums over scored tokens
    old_seq_logps: Tensor,  # [B]
    advantages: Tensor,  # [B]
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> PolicyLoss:
    """RLOO: mean over completions. Clip marks are per completion, `[B]`.

    Args:
        old_seq_logps: of the policy that sampled; `policy_seq_logps.detach()` in the first epoch.
        epsilon_low: 1 − ε_low is the smallest ratio that still teaches, 0 to 1.
        epsilon_high: 1 + ε_high is the largest, > 0.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_same_shape(
        policy_seq_logps=policy_seq_logps, old_seq_logps=old_seq_logps, advantages=advantages
    )
    log_ratio = full_precision(policy_seq_logps) - full_precision(old_seq_logps.detach())
    terms = clipped_surrogate(
        log_ratio, full_precision(advantages), epsilon_low=epsilon_low, epsilon_high=epsilon_high
    )
    return terms._replace(loss=terms.loss.mean())


__all__ = ["rloo_loss"]
