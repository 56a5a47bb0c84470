"""Odds ratio preference optimisation (Hong 2024, arXiv 2403.07691, eq. 4, 6 and 7).

With p = exp(mean token log-prob) and odds = p/(1 − p):

    loss = NLL(y_w|x) + λ · [−log σ(log odds(y_w) − log odds(y_l))]

λ is called beta, as in TRL. No reference model. The mean log-prob is cut at −eps (1.2e-7 in fp32):
an answer that is certain, or empty, would have infinite odds. Legend: P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpost.losses.arguments import require_positive, require_same_shape
from fastpost.losses.sequence import full_precision


class ORPOLoss(NamedTuple):
    """Loss and metrics per pair.

    Attributes:
        loss: `[P]`, differentiable.
        rewards_chosen: `[P]`, λ times the mean log-prob, detached.
        rewards_rejected: `[P]`, the same of the rejected answer.
        log_odds: `[P]`, log odds(y_w) − log odds(y_l), detached.
    """

    loss: Tensor
    rewards_chosen: Tensor
    rewards_rejected: Tensor
    log_odds: Tensor


def log_odds(mean_logps: Tensor) -> Tensor:
    """`log p − log(1 − p)` of `log p`, any shape; log p is cut at −eps of its dtype."""
    logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


def orpo_loss(
    policy_chosen_mean_logps: Tensor,  # [P] mean over scored tokens
    policy_rejected_mean_logps: Tensor,  # [P]
    chosen_nll: Tensor,  # [] for the batch, or [P]
    *,
    beta: float = 0.1,
) -> ORPOLoss:
    """ORPO per pair; a scalar `chosen_nll` is added to every pair, which leaves the mean right.

    Args:
        chosen_nll: negative log-likelihood per token of the chosen answers. TRL takes it over
            prompt and answer; the paper over the answer: `sft_loss` of the mask you mean.
        beta: λ of the paper, > 0.

    Raises:
        ValueError: a hyperparameter out of range, or shapes that differ.
    """
    require_positive("beta", beta, "0.1")
    require_same_shape(
        policy_chosen_mean_logps=policy_chosen_mean_logps,
        policy_rejected_mean_logps=policy_rejected_mean_logps,
    )
    if chosen_nll.ndim > 0:
        require_same_shape(policy_chosen_mean_logps=policy_chosen_mean_logps, chosen_nll=chosen_nll)
    chosen = full_precision(policy_chosen_mean_logps)
    rejected = full_precision(policy_rejected_mean_logps)
    ratio = log_odds(chosen) - log_odds(rejected)
    loss = chosen_nll - beta * F.logsigmoid(ratio)
    return ORPOLoss(loss, beta * chosen.detach(), beta * rejected.detach(), ratio.detach())


__all__ = ["ORPOLoss", "log_odds", "orpo_loss"]
