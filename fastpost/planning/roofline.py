"""Predicted time of a step, from traced operations and stated assumptions.

    compute  = FLOPs / (tflops * reached)
    weights  = bytes of optimizer, gradients and parameters moved once a step / bandwidth
    network  = (n - 1) / n * bytes gathered and scattered / (link * link_reached)
    batch    = max(compute, network) + (1 - overlap) * min(compute, network)
    step     = accumulation * batch + weights

Nothing here was measured on a GPU: every figure that results is a prediction, and its assumptions
are printed beside it.

Source: Williams et al., "Roofline" (CACM 2009); ring collectives move (n - 1) / n of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastpost.planning.ledger import GRADIENTS, OPTIMIZER, PARAMETERS
from fastpost.planning.trace import Traced

__all__ = ["Assumptions", "Prediction", "predict"]


@dataclass(frozen=True)
class Assumptions:
    """Shares of a GPU's figures that a run reaches.

    Attributes:
        reached: of its bf16 operations per second.
        link_reached: of the link between GPUs.
        overlap: share of the shorter of computing and communicating that is hidden.
    """

    reached: float = 0.45
    link_reached: float = 0.7
    overlap: float = 0.8

    def __post_init__(self) -> None:
        for name in ("reached", "link_reached", "overlap"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} {getattr(self, name)}: expected a share above 0 and at most 1"
                )


@dataclass(frozen=True)
class Prediction:
    """Seconds of an optimizer step, and of what it consists.

    Attributes:
        compute: FLOPs of one batch.
        network: collectives of one batch.
        weights: optimizer step.
        step: the whole step.
        tokens_per_second: over all GPUs, each token of a row counted once.
        gpu_hours: for `tokens` of the question, None without one.
        dollars: for these.
    """

    compute: float
    network: float
    weights: float
    step: float
    tokens_per_second: float
    gpu_hours: float | None
    dollars: float | None


def predict(
    traced: Traced, assumptions: Assumptions, train_tokens: float | None = None
) -> Prediction:
    """Predicted time, and hours and money for `train_tokens` tokens of training."""
    request, gpu = traced.request, traced.request.gpu
    share = (request.num_gpus - 1) / request.num_gpus
    compute = traced.total_flops / (gpu.tflops * 1e12 * assumptions.reached)
    moved = share * sum(traced.gathered.values())
    network = moved / (gpu.link * 1e9 * assumptions.link_reached)
    longer, shorter = max(compute, network), min(compute, network)
    at_rest, held = traced.at_rest, traced.peak.held
    trained = at_rest.get(PARAMETERS, 0) * traced.trained_bytes / max(1, traced.model_bytes)
    gradients = max(held.get(GRADIENTS, 0), trained)
    weights = 2 * (at_rest.get(OPTIMIZER, 0) + trained) + gradients
    seconds_weights = weights / (gpu.bandwidth * 1e9)
    batch = longer + (1 - assumptions.overlap) * shorter
    step = request.accumulation * batch + seconds_weights
    tokens = request.accumulation * request.num_gpus * request.row_tokens
    speed = tokens / step
    hours = dollars = None
    if train_tokens is not None:
        hours = train_tokens / speed / 3600 * request.num_gpus
        dollars = hours * gpu.price
    return Prediction(compute, network, seconds_weights, step, speed, hours, dollars)
