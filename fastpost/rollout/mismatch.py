"""How far the model that sampled is from the model that learns, on the tokens that were sampled.

With r = π_train(y_t)/π_rollout(y_t) for tokens sampled by π_rollout (Schulman 2020, "Approximating
KL divergence"; Kong 1992 for the effective sample size):

    k1 = −mean log r                 unbiased for KL(π_rollout ‖ π_train), may be negative
    k3 = mean (r − 1 − log r)        unbiased, never negative
    ess = (Σ r)² / (N Σ r²)          share of the tokens that importance weighting would leave

A sampler in another dtype or engine differs a little: a KL of 1e-4 to 1e-3 a token is usual. A
sampler with old weights or another chat template differs a lot, and every method that believes its
samples to be its own learns from somebody else's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# More tokens than this are thinned out evenly for the quantile, which sorts them.
_QUANTILE_TOKENS = 1_000_000


@dataclass(frozen=True)
class Mismatch:
    """Figures over the sampled tokens of one batch.

    Attributes:
        tokens: tokens compared.
        kl: k3 estimate of KL(rollout ‖ trainer), nats a token.
        kl_k1: k1 estimate of the same.
        ess: effective sample size of the importance weights, as a share in (0, 1].
        p99_ratio: 99 % quantile of π_train/π_rollout.
        max_ratio: the largest.
    """

    tokens: int
    kl: float
    kl_k1: float
    ess: float
    p99_ratio: float
    max_ratio: float

    def metrics(self) -> dict[str, float]:
        """Figures by the name they are logged under."""
        return {
            "rollout/kl": self.kl,
            "rollout/kl_k1": self.kl_k1,
            "rollout/ess": self.ess,
            "rollout/p99_ratio": self.p99_ratio,
            "rollout/max_ratio": self.max_ratio,
        }


def mismatch(rollout_logps: Tensor, trainer_logps: Tensor, mask: Tensor) -> Mismatch:
    """Compare log-probs of the same sampled tokens.

    Args:
        rollout_logps: `[...]`, of the model that sampled. NaN where it is not known.
        trainer_logps: `[...]`, of the model that learns.
        mask: `[...]` bool, True at sampled tokens.

    Returns:
        The figures; over no token at all, those of two equal models.
    """
    kept = mask.bool() & ~rollout_logps.isnan()
    log_ratio = (trainer_logps.detach().double() - rollout_logps.double())[kept]
    if log_ratio.numel() == 0:
        return Mismatch(0, 0.0, 0.0, 1.0, 1.0, 1.0)
    ratio = log_ratio.exp()
    sample = ratio[:: 1 + ratio.numel() // _QUANTILE_TOKENS]
    # exp(log r − max) keeps the weights finite: the share does not depend on their scale.
    weight = (log_ratio - log_ratio.max()).exp()
    return Mismatch(
        tokens=log_ratio.numel(),
        kl=(log_ratio.expm1() - log_ratio).mean().item(),
        kl_k1=-log_ratio.mean().item(),
        ess=(weight.sum().square() / (weight.numel() * weight.square().sum())).item(),
        p99_ratio=torch.quantile(sample, 0.99).item(),
        max_ratio=ratio.max().item(),
    )


class MismatchMeter:
    """Measures batches and stops the run where the two models are too far apart.

    Args:
        limit: largest `kl` (k3, nats a token) a batch may have; None only measures.

    Attributes:
        last: figures of the last batch, None before it.

    Raises:
        ValueError: the limit is not positive.
    """

    def __init__(self, limit: float | None = None) -> None:
        if limit is not None and not limit > 0:
            raise ValueError(
                f"rollout_mismatch_limit must be positive (nats a token) or None, got {limit}"
            )
        self.limit = limit
        self.last: Mismatch | None = None

    def measure(self, rollout_logps: Tensor, trainer_logps: Tensor, mask: Tensor) -> Mismatch:
        """Figures of a batch (see `mismatch`).

        Raises:
            RuntimeError: the KL is above the limit, or is not a number.
        """
        self.last = found = mismatch(rollout_logps, trainer_logps, mask)
        if self.limit is not None and not found.kl <= self.limit:
            raise RuntimeError(
                f"the model that samples is not the one that learns: KL {found.kl:.3g} nats a "
                f"token over {found.tokens} tokens, limit {self.limit:g} (k1 {found.kl_k1:.3g}, "
                f"effective sample size {found.ess:.1%}, ratio p99 {found.p99_ratio:.3g}, largest "
                f"{found.max_ratio:.3g}). Look for stale weights, a dtype too coarse "
                "(rollout_dtype) or a sampler with another temperature; raise "
                "rollout_mismatch_limit only if the figures are meant"
            )
        return found

    def metrics(
        self,
        rollout_logps: Tensor,
        trainer_logps: Tensor,
        mask: Tensor,
        gather: Callable[[Tensor], Tensor],
    ) -> dict[str, float]:
        """Figures of a batch by the name they are logged under, the mean over processes.

        Args:
            gather: stacks `[1, n]` of every process, as `accelerator.gather` does.

        Raises:
            RuntimeError: as `measure`, on the process whose batch is beyond the limit.
        """
        figures = self.measure(rollout_logps, trainer_logps, mask).metrics()
        local = torch.tensor([[*figures.values()]], device=trainer_logps.device)
        return dict(zip(figures, gather(local).mean(0).tolist(), strict=True))


__all__ = ["Mismatch", "MismatchMeter", "mismatch"]
