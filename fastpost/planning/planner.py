"""One call from a question to its answer: `plan(Request(...))`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastpost.planning.composition import trace_composed
from fastpost.planning.report import as_dict, checkpoint_bytes, describe
from fastpost.planning.request import Request
from fastpost.planning.roofline import Assumptions, Prediction, predict
from fastpost.planning.suggestions import changes_that_fit, fastest_that_fits
from fastpost.planning.trace import Traced, trace

__all__ = ["Plan", "fastest", "plan"]


@dataclass(frozen=True)
class Plan:
    """What a configuration takes: traced bytes and operations, predicted times.

    Attributes:
        traced: bytes by category and moment, operations by operator, of one GPU.
        predicted: seconds, tokens per second, hours, dollars.
        assumptions: what the predicted times rest on.
        changes: (words, traced) of the cheapest changes that make it fit, where they were asked
            for and it does not.
    """

    traced: Traced
    predicted: Prediction
    assumptions: Assumptions
    changes: tuple[tuple[str, Traced], ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the peak is within what tensors may have on the GPU."""
        return self.traced.headroom >= 0

    @property
    def peak_bytes(self) -> int:
        """Bytes of one GPU at the moment of most memory."""
        return self.traced.peak.total

    @property
    def held(self) -> dict[str, int]:
        """Category (of `ledger.CATEGORIES`) -> bytes at that moment."""
        return self.traced.peak.held

    @property
    def headroom_bytes(self) -> int:
        """Bytes left at that moment; negative where it does not fit."""
        return self.traced.headroom

    @property
    def host_bytes(self) -> int:
        """Pinned host memory of one GPU, for offloaded hidden states."""
        return self.traced.host_bytes

    @property
    def flops(self) -> int:
        """Operations of one GPU in one optimizer step."""
        return self.traced.total_flops * self.traced.request.accumulation

    @property
    def checkpoint_bytes(self) -> int:
        """Disk of one checkpoint, of all GPUs together."""
        return checkpoint_bytes(self.traced)

    def text(self) -> str:
        """The plan in words, at most 100 columns wide."""
        return describe(self.traced, self.predicted, self.assumptions)

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON."""
        found = as_dict(self.traced, self.predicted, self.assumptions)
        found["changes_that_fit"] = [
            {"change": words, "predicted_peak_bytes": other.peak.total}
            for words, other in self.changes
        ]
        return found


def plan(
    request: Request,
    config: Any = None,
    *,
    assumptions: Assumptions | None = None,
    train_tokens: float | None = None,
    whole: bool = False,
    suggest: bool = False,
) -> Plan:
    """Plan a configuration. No weights, network or GPU are needed.

    Args:
        request: what is planned.
        config: the model's configuration, of transformers; None reads `request.model`.
        assumptions: of the predicted times; None takes the stated defaults.
        train_tokens: of the whole training, to predict hours and money.
        whole: trace every layer instead of composing equal ones.
        suggest: where it does not fit, look for the cheapest changes that make it fit.

    Raises:
        ValueError: the model is unknown, or the configuration cannot be run.
        RuntimeError: this process takes part in a distributed run, and several GPUs are planned.
    """
    assumptions = Assumptions() if assumptions is None else assumptions
    run = _tracing(config, whole)
    traced = run(request)
    changes = changes_that_fit(request, run) if suggest and traced.headroom < 0 else []
    return Plan(traced, predict(traced, assumptions, train_tokens), assumptions, tuple(changes))


def fastest(
    request: Request,
    config: Any = None,
    *,
    assumptions: Assumptions | None = None,
    whole: bool = False,
) -> Request | None:
    """The predicted fastest configuration that fits, by what `fastest_that_fits` may change.

    Args:
        request, config, assumptions, whole: as in `plan`.

    Returns:
        The configuration, None if nothing fits.

    Raises:
        ValueError, RuntimeError: as `plan`.
    """
    assumptions = Assumptions() if assumptions is None else assumptions
    traced = fastest_that_fits(request, _tracing(config, whole), assumptions)
    return None if traced is None else traced.request


def _tracing(config: Any, whole: bool) -> Callable[[Request], Traced]:
    def run(request: Request) -> Traced:
        return trace(request, config) if whole else trace_composed(request, config)

    return run
