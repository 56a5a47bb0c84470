"""f-DPO: the implicit reward under other divergences (Wang 2023, arXiv 2309.16240, eq. 8, table 1).

DPO keeps the policy near the reference in reverse KL. With an f-divergence the reward of an answer
is β f'(π/π_ref) plus a constant of the prompt, and the constant cancels in a difference of rewards.
With u = log π(y|x) − log π_ref(y|x):

    reverse KL   f'(t) = log t (+ 1)               u
    forward KL   f'(t) = −1/t (+ 1)                1 − e^(−u)
    JS           f'(t) = log(2t / (t + 1))         log 2 + log σ(u)
    alpha        f'(t) = (t^(α−1) − 1) / (α − 1)   (e^((α−1)u) − 1) / (α − 1)

Each function here maps log-ratios to scores and is passed to a loss as `score`; only losses of the
difference of two scores accept one. Exponents are cut at 80, so that fp32 holds the result: beyond
it the score is constant and its gradient 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Score = Callable[[Tensor], Tensor]

MAX_EXPONENT = 80.0


def reverse_kl_score(logratios: Tensor) -> Tensor:
    """`[P]` → `[P]`: u, standard DPO."""
    return logratios


def forward_kl_score(logratios: Tensor) -> Tensor:
    """`[P]` → `[P]`: 1 − e^(−u)."""
    return -torch.expm1((-logratios).clamp(max=MAX_EXPONENT))


def js_divergence_score(logratios: Tensor) -> Tensor:
    """`[P]` → `[P]`: log 2 + log σ(u), at most log 2."""
    return math.log(2) + F.logsigmoid(logratios)


def alpha_divergence_score(logratios: Tensor, *, f_alpha_divergence_coef: float = 0.5) -> Tensor:
    """`[P]` → `[P]`: (e^((α−1)u) − 1)/(α − 1); α = 1 is the limit u.

    Bind α with `functools.partial(alpha_divergence_score, f_alpha_divergence_coef=0.3)`.

    Raises:
        ValueError: α is not a finite number.
    """
    if not math.isfinite(f_alpha_divergence_coef):
        raise ValueError(
            f"f_alpha_divergence_coef={f_alpha_divergence_coef} was given, expected a finite "
            "number; pass 0.5"
        )
    power = f_alpha_divergence_coef - 1.0
    if abs(power) < 1e-6:
        return logratios
    return torch.expm1((power * logratios).clamp(max=MAX_EXPONENT)) / power


__all__ = [
    "Score",
    "alpha_divergence_score",
    "forward_kl_score",
    "js_divergence_score",
    "reverse_kl_score",
]
