"""Per-token estimates of KL(π ‖ π_ref) from tokens sampled by π (Schulman 2020, "Approximating KL
divergence"). With d = log π_ref(y_t) − log π(y_t):

    k1 = −d               unbiased, may be negative
    k2 = ½ d²             biased, low variance, never negative
    k3 = e^d − 1 − d      unbiased, never negative (GRPO: Shao 2024, arXiv 2402.03300, eq. 4)

As a loss on on-policy tokens only k2 has the gradient of KL(π ‖ π_ref) in expectation: k1's is zero
in expectation, k3's is that of KL(π_ref ‖ π). Inside a reward k1 is the unbiased choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.losses.arguments import require_same_shape
from fastpost.losses.sequence import full_precision


def _log_ratio(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    require_same_shape(policy_logps=policy_logps, ref_logps=ref_logps)
    return full_precision(ref_logps.detach()) - full_precision(policy_logps)


def kl_k1(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """`[...]` → `[...]`: log π − log π_ref. The reference receives no gradient."""
    return -_log_ratio(policy_logps, ref_logps)


def kl_k2(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """`[...]` → `[...]`: ½ (log π_ref − log π)². The reference receives no gradient."""
    return 0.5 * _log_ratio(policy_logps, ref_logps).square()


def kl_k3(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """`[...]` → `[...]`: π_ref/π − 1 − log(π_ref/π). The reference receives no gradient."""
    log_ratio = _log_ratio(policy_logps, ref_logps)
    # expm1 keeps the small differences of a policy that has hardly moved
    return torch.expm1(log_ratio) - log_ratio


__all__ = ["kl_k1", "kl_k2", "kl_k3"]
