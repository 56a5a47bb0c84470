"""Group sequence policy optimisation (Zheng 2025, arXiv 2507.18071, eq. 5 and 7).

    loss = 1/B Σ_i [−min(s_i A_i, clip(s_i, 1 − ε_low, 1 + ε_high) A_i) + β mean_t k3_it]
    s_i = exp(1/|y_i| Σ_t log(π(y_it) / π_old(y_it)))

One ratio per completion, the geometric mean over its tokens: what is rewarded as a whole is clipped
as a whole. ε is of the order of 1e-4. A_i as in `grpo`. Legend: B completions, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from fastpost.losses.arguments import require_one_per_row
from fastpost.losses.clipped_surrogate import PolicyLoss, clipped_surrogate, reference_kl
from fastpost.losses.sequence import full_precision, scored, seq_mean


def gspo_loss(
    policy_logps: Tensor,  # [B, T]
    old_logps: Tensor,  # [B, T]
    advantages: Tensor,  # [B]
    response_mask: Tensor,  # [B, T] bool
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
    ref_logps: Tensor | None = None,  # [B, T]
    beta: float = 0.0,
) -> PolicyLoss:
    """GSPO: mean over completions; an empty one counts 0. Clip marks are per completion, `[B]`.

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
    require_one_per_row("advantages", advantages, policy_logps)
    log_ratio = scored(policy_logps, response_mask) - scored(old_logps.detach(), response_mask)
    # an empty completion has ratio 1 whatever the policy: without an advantage it adds no constant
    advantages = full_precision(advantages).masked_fill(~response_mask.any(dim=-1), 0.0)
    terms = clipped_surrogate(
        seq_mean(log_ratio, response_mask),
        advantages,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
    )
    loss = terms.loss
    kl = reference_kl(policy_logps, ref_logps, response_mask, beta)
    if kl is not None:
        loss = loss + beta * seq_mean(kl, response_mask)
        kl = kl.detach()
    return terms._replace(loss=loss.mean(), kl=kl)


__all__ = ["gspo_loss"]
