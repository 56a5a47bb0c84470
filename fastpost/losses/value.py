"""Value loss with clipping (as in PPO's reference code; Huang 2022, "The 37 implementation details
of proximal policy optimization", detail 9).

    loss = 1/N Σ_bt ½ max((V_t − R_t)², (clip(V_t, V_old,t − ε, V_old,t + ε) − R_t)²)

The larger of the two errors: a value may not profit from moving further than ε from the one that
the advantages were computed with. Legend: B completions, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpost.losses.arguments import require_positive
from fastpost.losses.sequence import scored, token_mean


class ValueLoss(NamedTuple):
    """Loss and clip marks.

    Attributes:
        loss: `[]`, differentiable.
        is_clipped: `[B, T]` bool: the clipped error is the larger one, so the gradient is 0.
    """

    loss: Tensor
    is_clipped: Tensor


def value_loss(
    values: Tensor,  # [B, T]
    old_values: Tensor,  # [B, T]
    returns: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T] bool
    *,
    epsilon: float = 0.2,
    num_items: int | Tensor | None = None,
) -> ValueLoss:
    """Clipped value loss: mean over scored tokens, 0 where there is none.

    Args:
        old_values: of the value head when the rollout was scored.
        returns: targets R from `gae`.
        epsilon: how far a value may profitably move, > 0, in units of the reward.
        num_items: scored tokens of the accumulated batch over all ranks; None: of this batch.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: ε is not positive, or shapes that differ.
    """
    require_positive("epsilon", epsilon, "0.2")
    values = scored(values, response_mask)
    old = scored(old_values.detach(), response_mask)
    returns = scored(returns.detach(), response_mask)
    error = (values - returns).square()
    clipped_error = (values.clamp(old - epsilon, old + epsilon) - returns).square()
    loss = token_mean(0.5 * error.maximum(clipped_error), response_mask, num_items)
    return ValueLoss(loss, (clipped_error > error) & response_mask)


__all__ = ["ValueLoss", "value_loss"]
