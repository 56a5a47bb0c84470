"""Advantages from the rewards of G completions of the same prompt, and whitening.

    group           A_i = (r_i − mean r) / (std r + 1e-4)      GRPO (arXiv 2402.03300)
    centred         A_i = r_i − mean r                         Dr. GRPO (arXiv 2503.20783)
    leave one out   A_i = r_i − mean of the others' rewards    RLOO (arXiv 2402.14740)
    whiten          A_t = (A_t − mean A) / sqrt(var A + 1e-8)  PPO, over scored tokens

std and var have Bessel's correction. A reward of nan marks a completion nobody could score: it
takes no part in its group's statistics and its advantage is 0, as is that of a completion alone in
its group. Completions of a prompt are neighbours. Legend: B = prompts · G completions, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.losses.sequence import full_precision, scored, token_mean

STD_EPSILON = 1e-4


def _in_groups(rewards: Tensor, num_generations: int) -> Tensor:
    if num_generations < 1 or rewards.ndim != 1 or rewards.numel() % num_generations:
        raise ValueError(
            f"rewards of shape {list(rewards.shape)} were given with num_generations="
            f"{num_generations}, expected [prompts * num_generations]; pass whole groups, the "
            "completions of a prompt side by side"
        )
    return full_precision(rewards.detach()).view(-1, num_generations)


def _centred(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards minus their group's mean, 0 where nan, and the number of rewards `[prompts, 1]`."""
    num_rewards = (~groups.isnan()).sum(dim=1, keepdim=True)
    mean = groups.nansum(dim=1, keepdim=True) / num_rewards.clamp(min=1)
    return (groups - mean).nan_to_num(nan=0.0), num_rewards


def centred_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """`[B]` → `[B]`: reward minus the group's mean.

    Raises:
        ValueError: the rewards are not whole groups.
    """
    return _centred(_in_groups(rewards, num_generations))[0].flatten()


def group_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """`[B]` → `[B]`: the same over the group's standard deviation; 0 where all rewards are equal.

    Raises:
        ValueError: the rewards are not whole groups.
    """
    centred, num_rewards = _centred(_in_groups(rewards, num_generations))
    variance = centred.square().sum(dim=1, keepdim=True) / (num_rewards - 1).clamp(min=1)
    return (centred / (variance.sqrt() + STD_EPSILON)).flatten()


def leave_one_out_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """`[B]` → `[B]`: reward minus the mean of the others, = G/(G − 1) (reward − mean of all).

    Raises:
        ValueError: the rewards are not whole groups.
    """
    centred, num_rewards = _centred(_in_groups(rewards, num_generations))
    return (centred * num_rewards / (num_rewards - 1).clamp(min=1)).flatten()


@torch.no_grad()
def whiten(
    advantages: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T] bool
) -> Tensor:
    """`[B, T]`: mean 0 and variance 1 over scored tokens, 0 at the others; a lone token gives 0.

    With several ranks gather first, or accept that each whitens its own batch.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the shapes differ.
    """
    centred = scored(advantages, response_mask) - token_mean(advantages, response_mask)
    variance = token_mean(centred.square(), response_mask, (response_mask.sum() - 1).clamp(min=1))
    return scored(centred * (variance + 1e-8).rsqrt(), response_mask)


__all__ = [
    "centred_advantages",
    "group_advantages",
    "leave_one_out_advantages",
    "whiten",
]
