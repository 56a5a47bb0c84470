"""Proximal policy optimisation of a language model (Schulman 2017, arXiv 1707.06347, eq. 7; token
rewards of Ouyang 2022, arXiv 2203.02155, eq. 2).

    loss = 1/N Σ_bt −min(ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t),    ρ_t = π(y_t) / π_old(y_t)
    r_t = −β k_t + [t is the last scored token] · r(x, y)

k_t is the KL estimate of the sampling policy to the reference, `kl_k1`; A_t comes from `gae` on
r_t. The value head's side is `value_loss`. Legend: B completions, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.losses.arguments import (
    require_nonnegative,
    require_one_per_row,
    require_positive,
    require_same_shape,
)
from fastpost.losses.clipped_surrogate import PolicyLoss, clipped_token_loss
from fastpost.losses.sequence import full_precision, scored, token_mean


def ppo_loss(
    policy_logps: Tensor,  # [B, T]
    old_logps: Tensor,  # [B, T]
    advantages: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T] bool
    *,
    epsilon: float = 0.2,
    num_items: int | Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy loss: mean over scored tokens, 0 where there is none.

    Args:
        old_logps: of the policy that sampled.
        epsilon: half-width of the interval of ratios that teach, 0 < ε ≤ 1.
        num_items: scored tokens of the accumulated batch over all ranks; None: of this batch.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("epsilon", epsilon, "0.2")
    require_same_shape(policy_logps=policy_logps, advantages=advantages)
    terms = clipped_token_loss(
        policy_logps,
        old_logps,
        advantages,
        response_mask,
        epsilon_low=epsilon,
        epsilon_high=epsilon,
    )
    return terms._replace(loss=token_mean(terms.loss, response_mask, num_items))


@torch.no_grad()
def kl_penalised_rewards(
    rewards: Tensor,  # [B] of the whole completion
    kl: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T] bool
    *,
    beta: float,
) -> Tensor:
    """`[B, T]`: rewards per token, 0 at unscored ones; the reward of an empty completion is lost.

    Args:
        beta: weight β ≥ 0 of the KL.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: β is negative, or shapes that do not fit.
    """
    require_nonnegative("beta", beta, "0.05")
    require_one_per_row("rewards", rewards, kl)
    penalties = -beta * scored(kl, response_mask)
    still_to_come = response_mask.flip(-1).cumsum(dim=-1).flip(-1)
    is_last = response_mask & (still_to_come == 1)
    return penalties + torch.where(is_last, full_precision(rewards).unsqueeze(-1), 0.0)


__all__ = ["kl_penalised_rewards", "ppo_loss"]
