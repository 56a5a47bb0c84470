"""Stateless layers for `kernels.kernelize`: they replace the forward of a module with a `weight`.

Only `forward` and the two flags that the Kernel Hub reads, as its requirements ask.
"""

from __future__ import annotations

from torch import Tensor, nn

from .linear_cross_entropy import linear_cross_entropy
from .linear_logprob import linear_logprob

__all__ = ["LinearCrossEntropyHead", "LinearLogprobHead"]


class LinearLogprobHead(nn.Module):
    """(hidden [M, H], targets [M]) -> log-probs [M] of a head with `weight` [V, H]."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_logprob(hidden, self.weight, targets).logprob


class LinearCrossEntropyHead(nn.Module):
    """(hidden [M, H], targets [M]) -> mean cross-entropy of a head with `weight` [V, H]."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, self.weight, targets).loss
