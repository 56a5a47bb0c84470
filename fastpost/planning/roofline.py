"""Predicted time of a step, from traced operations and stated assumptions.

    compute  = FLOPs / (tflops * reached)
    weights  = bytes of optimizer, gradients and parameters moved once a step / bandwidth
    network  = (n - 1) / n * bytes gathered and scattered / (link * link_reached)
    host     = 2 * bytes of offloaded hidden states / host_link
    batch    = longest of compute, network, host + (1 - overlap) * the others
    token    = (bytes of the sampling weights + half of the last cache) / bandwidth, or the time to
               gather the weights where they are sharded and that takes longer
    sampling = FLOPs of the prefill / (tflops * reached) + tokens of a completion * token
    step     = accumulation * batch + weights + sampling

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
        host_link: 10^9 bytes per second between a GPU and host memory, one direction.
    """

    reached: float = 0.45
    link_reached: float = 0.7
    overlap: float = 0.8
    host_link: float = 25.0

    def __post_init__(self) -> None:
        for name in ("reached", "link_reached", "overlap"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} {getattr(self, name)}: expected a share above 0 and at most 1"
                )
        if not self.host_link > 0:
            raise ValueError(f"host_link {self.host_link}: expected GB/s above 0")


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
        host: moving offloaded hidden states of one batch.
        sampling: a rollout, of methods that sample; scoring completions by rewards is not in it.
    """

    compute: float
    network: float
    weights: float
    step: float
    tokens_per_second: float
    gpu_hours: float | None
    dollars: float | None
    host: float = 0.0
    sampling: float = 0.0


def predict(
    traced: Traced, assumptions: Assumptions, train_tokens: float | None = None
) -> Prediction:
    """Predicted time, and hours and money for `train_tokens` tokens of training."""
    request, gpu = traced.request, traced.request.gpu
    share = (request.num_gpus - 1) / request.num_gpus
    compute = traced.total_flops / (gpu.tflops * 1e12 * assumptions.reached)
    moved = share * sum(traced.gathered.values())
    network = moved / (gpu.link * 1e9 * assumptions.link_reached)
    host = 2 * traced.host_bytes / (assumptions.host_link * 1e9)
    *shorter, longest = sorted((compute, network, host))
    at_rest, held = traced.at_rest, traced.peak.held
    trained = at_rest.get(PARAMETERS, 0) * traced.trained_bytes / max(1, traced.model_bytes)
    gradients = max(held.get(GRADIENTS, 0), trained)
    weights = 2 * (at_rest.get(OPTIMIZER, 0) + trained) + gradients
    seconds_weights = weights / (gpu.bandwidth * 1e9)
    batch = longest + (1 - assumptions.overlap) * sum(shorter)
    sampling = _sampling(traced, assumptions, share)
    step = request.accumulation * batch + seconds_weights + sampling
    tokens = request.accumulation * request.num_gpus * request.row_tokens
    speed = tokens / step
    hours = dollars = None
    if train_tokens is not None:
        hours = train_tokens / speed / 3600 * request.num_gpus
        dollars = hours * gpu.price
    return Prediction(
        compute, network, seconds_weights, step, speed, hours, dollars, host, sampling
    )


def _sampling(traced: Traced, assumptions: Assumptions, share: float) -> float:
    """Seconds of one rollout."""
    figures, gpu, request = traced.sampled, traced.request.gpu, traced.request
    if not figures:
        return 0.0
    prefill = figures["prefill_flops"] / (gpu.tflops * 1e12 * assumptions.reached)
    read = figures["weight_bytes"] + figures["cache_bytes"] / 2
    gathered = share * figures["gathered_bytes"] / (gpu.link * 1e9 * assumptions.link_reached)
    token = max(read / (gpu.bandwidth * 1e9), gathered)
    return prefill + (request.seq - request.num_prompt) * token
