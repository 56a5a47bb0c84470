"""The weight of the KL penalty, fixed or steered to a target (Ziegler 2019, arXiv 1909.08593,
§2.2).

    e = clip((KL − target) / target, −0.2, 0.2),    β ← β (1 + e · n / horizon)

KL is the mean over completions of Σ_t (log π(y_t) − log π_ref(y_t)), in nats; n is the number of
completions it was measured on. β changes by a factor of at most 1.2 in `horizon` completions.
"""

from __future__ import annotations

_LARGEST_ERROR = 0.2


class KLController:
    """Holds β.

    Args:
        coefficient: β at the beginning, ≥ 0.
        target: KL per completion in nats that β is steered to; None keeps β as it is.
        horizon: completions over which β moves by at most a fifth.

    Attributes:
        coefficient: β now.
    """

    def __init__(self, coefficient: float, target: float | None, horizon: int) -> None:
        self.coefficient = coefficient
        self._target = target
        self._horizon = horizon

    def update(self, kl: float, num_completions: int) -> None:
        """Move β after a rollout whose mean KL per completion was `kl`."""
        if self._target is None:
            return
        error = kl / self._target - 1.0
        error = min(max(error, -_LARGEST_ERROR), _LARGEST_ERROR)
        self.coefficient *= 1.0 + error * num_completions / self._horizon


__all__ = ["KLController"]
