"""Generalised advantage estimation (Schulman 2015, arXiv 1506.02438, eq. 16).

    δ_t = r_t + γ V_{t+1} − V_t
    A_t = δ_t + γ λ A_{t+1},    R_t = A_t + V_t

Behind the last scored token V and A are 0: the completion has ended. Unscored tokens in between (a
tool's output) are not steps: the scored token before them looks at the scored one behind them.
Legend: B completions, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.losses.arguments import require_between
from fastpost.losses.sequence import scored


class AdvantageEstimate(NamedTuple):
    """Both without gradient and 0 at unscored tokens.

    Attributes:
        advantages: `[B, T]`, not whitened.
        returns: `[B, T]`, targets of the value head.
    """

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def gae(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T] bool
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> AdvantageEstimate:
    """Advantages and returns per token; T steps of vectors of B.

    Args:
        gamma: discount γ per token, 0 to 1.
        gae_lambda: λ, 0 (one-step, biased by V) to 1 (Monte Carlo).

    Raises:
        TypeError: the mask is not boolean.
        ValueError: γ or λ out of range, shapes that differ, or a reward at an unscored token, which
            no token could be credited with.
    """
    require_between("gamma", gamma, 0.0, 1.0, "1.0")
    require_between("gae_lambda", gae_lambda, 0.0, 1.0, "0.95")
    values = scored(values, response_mask)
    step_rewards = scored(rewards, response_mask)
    # one synchronisation per rollout, not per step
    if bool((rewards.masked_fill(response_mask, 0.0) != 0).any()):
        raise ValueError(
            "a reward was given at a token outside response_mask, expected 0 there; put it on the "
            "last scored token (kl_penalised_rewards does)"
        )
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(values.shape[0])
    next_advantage = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        is_step = response_mask[:, t]
        delta = step_rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(
            is_step, delta + gamma * gae_lambda * next_advantage, next_advantage
        )
        next_value = torch.where(is_step, values[:, t], next_value)
        advantages[:, t] = torch.where(is_step, next_advantage, 0.0)
    return AdvantageEstimate(advantages, advantages + values)


__all__ = ["AdvantageEstimate", "gae"]
