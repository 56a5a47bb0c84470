"""One step of either side: traced at 4 and 5 layers and composed to all of them by the planner."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

from bench.scale.trl_step import trace_stock
from fastpost.planning import composition, trace
from fastpost.planning.ledger import ACTIVATIONS, HEAD_WORKSPACE, KERNEL_WORKSPACE, Peak
from fastpost.planning.request import Request
from fastpost.planning.trace import Traced

__all__ = ["activation_bytes", "ours", "peak_of_step", "stock", "summary"]

Batch = dict[str, Tensor]
_COMPUTED = (ACTIVATIONS, HEAD_WORKSPACE, KERNEL_WORKSPACE)


def ours(request: Request, batch: Batch, *, config: Any = None) -> Traced:
    """Ours on a batch of `lengths.as_batch`, which takes the place of the planner's own."""
    with mock.patch.object(trace, "worst_batch", lambda *_: batch):
        return composition.trace_composed(request, config)


def stock(request: Request, batch: Batch, *, config: Any = None) -> Traced:
    """Stock TRL's on the same batch."""

    def trace_one(request: Request, config: Any, **_: Any) -> Traced:
        return trace_stock(request, batch, config)

    with mock.patch.object(composition, "trace", trace_one):
        return composition.trace_composed(request, config)


def peak_of_step(traced: Traced) -> Peak:
    """The moment of most memory of forward, backward and optimizer; rollouts are left out."""
    return max(_windows(traced), key=lambda peak: peak.total)


def activation_bytes(traced: Traced) -> int:
    """Most bytes of activations, head and kernels' workspace, at the peaks of the model's parts."""
    return max(sum(peak.held.get(name, 0) for name in _COMPUTED) for peak in _windows(traced))


def summary(traced: Traced) -> dict[str, Any]:
    """What is stored of a side."""
    peak = peak_of_step(traced)
    return {
        "flops": traced.total_flops,
        "peak_bytes": peak.total,
        "activation_bytes": activation_bytes(traced),
        "fits": peak.total <= traced.request.gpu.usable,
        "at_the_peak": {"moment": str(peak.moment), "held": peak.held},
        "tokens": traced.tokens,
        "fallbacks": traced.fallbacks,
    }


def _windows(traced: Traced) -> list[Peak]:
    return [peak for window, peak in traced.windows.items() if "rollout" not in window.phase]
