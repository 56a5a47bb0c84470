"""The clipped policy-gradient term that PPO, GRPO and their kin share (Schulman 2017, arXiv
1707.06347, eq. 7).

    loss_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t) + β k3_t
    ρ_t = π(y_t) / π_old(y_t),    k3_t = KL estimate to the reference, see `kl`

The methods differ in what ρ is taken over, in the advantages and in how terms are averaged: that is
in their files. log ρ is cut at 20, so that ρ stays finite and ρ · 0 is not nan; a ratio of e^20
means that the log-probs belong to other tokens. Legend: B completions, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpost.losses.arguments import (
    require_between,
    require_nonnegative,
    require_one_per_row,
    require_positive,
)
from fastpost.losses.kl import kl_k3
from fastpost.losses.sequence import scored

MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """A policy-gradient loss and what its trainer reports.

    Attributes:
        loss: `[]`, differentiable; `[B, T]` from `clipped_token_loss`.
        is_low_clipped: `[B, T]` bool, or `[B]` for ratios of sequences: ρ < 1 − ε_low and A < 0.
        is_high_clipped: the same shape: ρ > 1 + ε_high and A > 0.
        kl: `[B, T]`, detached, 0 at unscored tokens; None without a reference.
    """

    loss: Tensor
    is_low_clipped: Tensor
    is_high_clipped: Tensor
    kl: Tensor | None


def clipped_surrogate(
    log_ratio: Tensor,  # [...]
    advantages: Tensor,  # broadcasts to [...]
    *,
    epsilon_low: float,
    epsilon_high: float,
) -> PolicyLoss:
    """The term without KL, of the shape of `log_ratio`.

    Raises:
        ValueError: ε_low is not in [0, 1], or ε_high is not positive.
    """
    require_between("epsilon_low", epsilon_low, 0.0, 1.0, "0.2")
    require_positive("epsilon_high", epsilon_high, "0.2")
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    advantages = advantages.detach()
    return PolicyLoss(
        loss=-(ratio * advantages).minimum(clipped * advantages),
        is_low_clipped=(ratio < 1 - epsilon_low) & (advantages < 0),
        is_high_clipped=(ratio > 1 + epsilon_high) & (advantages > 0),
        kl=None,
    )


def reference_kl(
    policy_logps: Tensor,  # [B, T]
    ref_logps: Tensor | None,  # [B, T]
    response_mask: Tensor,  # [B, T] bool
    beta: float,
) -> Tensor | None:
    """`[B, T]`: k3 at scored tokens, 0 elsewhere; None for β = 0 without a reference.

    Raises:
        ValueError: β is negative, or one of β and `ref_logps` is given without the other.
    """
    require_nonnegative("beta", beta, "0.04 with ref_logps, or 0.0 without")
    if (ref_logps is None) != (beta == 0.0):
        raise ValueError(
            f"beta={beta} was given {'without' if ref_logps is None else 'with'} ref_logps, "
            "expected both or neither; pass the reference's log-probs with beta > 0, or leave "
            "both out"
        )
    if ref_logps is None:
        return None
    return kl_k3(scored(policy_logps, response_mask), scored(ref_logps, response_mask))


def clipped_token_loss(
    policy_logps: Tensor,  # [B, T]
    old_logps: Tensor,  # [B, T]
    advantages: Tensor,  # [B] or [B, T]
    response_mask: Tensor,  # [B, T] bool
    *,
    epsilon_low: float,
    epsilon_high: float,
    ref_logps: Tensor | None = None,  # [B, T]
    beta: float = 0.0,
) -> PolicyLoss:
    """Term and KL per token, `loss` `[B, T]` and 0 at unscored tokens: average it as you mean.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: a hyperparameter out of range, or shapes that do not fit.
    """
    if advantages.ndim == 1:
        require_one_per_row("advantages", advantages, policy_logps)
        advantages = advantages.unsqueeze(1).expand_as(policy_logps)
    advantages = scored(advantages, response_mask)
    log_ratio = scored(policy_logps, response_mask) - scored(old_logps.detach(), response_mask)
    terms = clipped_surrogate(
        log_ratio, advantages, epsilon_low=epsilon_low, epsilon_high=epsilon_high
    )
    kl = reference_kl(policy_logps, ref_logps, response_mask, beta)
    if kl is None:
        return terms
    return terms._replace(loss=terms.loss + beta * kl, kl=kl.detach())


__all__ = ["PolicyLoss", "clipped_surrogate", "clipped_token_loss", "reference_kl"]
