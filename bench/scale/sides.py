"""One step of either side: traced at 4 and 5 layers and composed to all of them by the planner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from bench.scale.tracer import SideTracer
from bench.scale.trl_step import trace_stock
from fastpost.planning import composition, trace
from fastpost.planning.ledger import ACTIVATIONS, HEAD_WORKSPACE, KERNEL_WORKSPACE, Peak
from fastpost.planning.request import Request
from fastpost.planning.trace import Traced
from fastpost.tiled_mlp import tile

__all__ = ["activation_bytes", "ours", "peak_of_step", "stock", "summary"]

Batch = dict[str, Tensor]
_COMPUTED = (ACTIVATIONS, HEAD_WORKSPACE, KERNEL_WORKSPACE)


def ours(
    request: Request, batch: Batch, *, tile_tokens: int | None = None, config: Any = None
) -> Traced:
    """Ours on a batch of `lengths.as_batch`; `tile_tokens` is the trainers' `mlp_tile_tokens`."""
    with _planning(batch, tile_tokens):
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
    return [peak for (phase, _), peak in traced.windows.items() if "rollout" not in phase]


@contextmanager
def _planning(batch: Batch, tile_tokens: int | None) -> Iterator[None]:
    """The planner on this batch instead of its own, with tiled MLPs if asked for."""
    make_policy = trace.make_policy

    def tiled(*args: Any) -> Any:
        model, engine = make_policy(*args)
        assert tile_tokens is not None
        tile(model, tile_tokens)
        return model, engine

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(trace, "worst_batch", lambda *_: batch))
        stack.enter_context(mock.patch.object(trace, "Tracer", SideTracer))
        if tile_tokens is not None:
            stack.enter_context(mock.patch.object(trace, "make_policy", tiled))
        yield
