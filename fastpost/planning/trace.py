"""Traces two optimizer steps of a configuration and says what they took.

The first step makes the optimizer's states, the second is like all that follow. With gradient
accumulation each step has two batches: the second one meets the gradients of the first. Gradients
are clipped by their norm, as trainers do unless told otherwise.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastpost.adapters.nf4_layer import Nf4Linear
from fastpost.optimizer_in_backward import BackwardSteps
from fastpost.planning.batches import worst_batch
from fastpost.planning.host_memory import host_states_named
from fastpost.planning.ledger import GRADIENTS, HOST, OPTIMIZER, Peak, Window
from fastpost.planning.methods import Objective, make_objective
from fastpost.planning.models import load_config
from fastpost.planning.optimizers import make_optimizer
from fastpost.planning.regions import follow_layers
from fastpost.planning.request import Request
from fastpost.planning.rollouts import Rollouts
from fastpost.planning.sharding import communication_named, pretended_processes
from fastpost.planning.subject import make_policy
from fastpost.planning.tracer import Tracer

__all__ = ["Traced", "trace"]

_MAX_NORM = 1.0  # `max_grad_norm` of transformers; its value costs nothing


@dataclass(frozen=True)
class Traced:
    """What one GPU of a configuration holds and computes.

    Attributes:
        request: the configuration.
        windows: stretch of a step -> its moment of most memory, in two steps.
        at_rest: category -> bytes between steps.
        flops: operator -> operations of one batch.
        gathered: collective -> bytes of whole tensors, of one batch.
        num_parameters: of the policy over all GPUs, its adapter included.
        num_trained: of them trained.
        trained_bytes: of the trained parameters over all GPUs.
        model_bytes: of all of the policy's parameters over all GPUs.
        tokens: computed by this GPU in one batch, without padding and repeated prefixes.
        fallbacks: reason -> times the engine left its fast path.
        seconds: what tracing took.
        sampled: of a rollout, see `rollouts.Rollouts.figures`; empty for other methods.
        host_bytes: of pinned host memory, where hidden states are offloaded.
    """

    request: Request
    windows: dict[Window, Peak]
    at_rest: dict[str, int]
    flops: dict[str, int]
    gathered: dict[str, int]
    num_parameters: int
    num_trained: int
    trained_bytes: int
    model_bytes: int
    tokens: int
    fallbacks: dict[str, int]
    seconds: float
    sampled: dict[str, int] = field(default_factory=dict)
    host_bytes: int = 0

    @property
    def peak(self) -> Peak:
        """The moment of most memory."""
        return max(self.windows.values(), key=lambda peak: peak.total)

    @property
    def total_flops(self) -> int:
        """Operations of one batch on this GPU."""
        return sum(self.flops.values())

    @property
    def headroom(self) -> int:
        """Bytes left at the peak; negative where the configuration does not fit."""
        return self.request.gpu.usable - self.peak.total


def trace(request: Request, config: Any = None, *, on_gpu: bool = True) -> Traced:
    """Trace a configuration.

    Args:
        request: what to trace.
        config: the model's configuration; None reads `request.model`.
        on_gpu: as it would run on a GPU; False as it does on a CPU.

    Raises:
        ValueError: the model is unknown, or its experts cannot be multiplied in this precision.
        RuntimeError: a process group is initialised and more than one GPU is asked for.
    """
    began = time.perf_counter()
    config = load_config(request.model) if config is None else config
    _check_experts(request, config)
    tracer = Tracer("triton" if on_gpu else None)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(pretended_processes(request.num_gpus))
        stack.enter_context(tracer.tracing())
        stack.enter_context(communication_named(tracer))
        if on_gpu:
            stack.enter_context(host_states_named(tracer))
        model, engine = make_policy(request, config, tracer, on_gpu)
        follow_layers(model, tracer)
        try:
            objective = make_objective(request, config, model, engine, tracer, on_gpu)
            rollouts = Rollouts(request, config, model, tracer) if request.samples else None
            return _steps(request, config, model, engine, objective, rollouts, tracer, began)
        finally:
            engine.remove()


def _check_experts(request: Request, config: Any) -> None:
    is_mixture = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    is_wide = request.precision == "mixed" and request.adapter is None
    if is_mixture and is_wide and request.num_gpus == 1:
        raise ValueError(
            "grouped products of experts take bf16 weights, which autocast does not make of fp32 "
            "ones: choose precision bf16, an adapter, or several GPUs (FSDP2 gathers in bf16)"
        )


def _steps(
    request: Request,
    config: Any,
    model: Any,
    engine: Any,
    objective: Objective,
    rollouts: Rollouts | None,
    tracer: Tracer,
    began: float,
) -> Traced:
    with unset_fake_temporarily():
        batch = worst_batch(request, config.get_text_config().vocab_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(request.optimizer, trained)
    update = _Update(request, model, trained, optimizer, tracer)
    start = tracer.ledger.now()
    flops: Counter[str] = Counter()
    gathered: Counter[str] = Counter()
    for step in ("first step", "second step"):
        if rollouts is not None:
            rollouts.sample(step)
        for _ in range(min(request.accumulation, 2)):
            tracer.flops.clear()
            tracer.collectives.clear()
            with tracer.during(f"{step}, forward"):
                loss = objective(batch)
            with tracer.during(f"{step}, backward"):
                update.begin()
                loss.backward()
            del loss
            update.name_gradients()
            flops, gathered = Counter(tracer.flops), Counter(tracer.collectives)
        update.finish(step)
    every = list(model.parameters())
    return Traced(
        request=request,
        windows=tracer.ledger.peaks(start),
        at_rest=tracer.ledger.held(),
        flops=dict(flops),
        gathered=dict(gathered),
        sampled={} if rollouts is None else rollouts.figures,
        host_bytes=tracer.ledger.most(HOST),
        num_parameters=_count(model, trained_only=False),
        num_trained=_count(model, trained_only=True),
        trained_bytes=sum(p.numel() * p.itemsize for p in trained),
        model_bytes=sum(p.numel() * p.itemsize for p in every),
        tokens=engine.stats.unique_tokens // (2 * min(request.accumulation, 2)),
        fallbacks=dict(engine.fallbacks),
        seconds=time.perf_counter() - began,
    )


class _Update:
    """The end of a step: clipping and the optimizer, or the optimizer within the backward."""

    def __init__(
        self, request: Request, model: Any, trained: list[Any], optimizer: Any, tracer: Tracer
    ) -> None:
        self._trained, self._optimizer, self._tracer = trained, optimizer, tracer
        self._hooks: BackwardSteps | None = None
        if request.optimizer_in_backward:
            step = optimizer.step

            def named_step() -> None:
                self.name_gradients()
                with tracer.during("", OPTIMIZER):
                    step()

            optimizer.step = named_step
            self._hooks = BackwardSteps(model, optimizer)

    def begin(self) -> None:
        """Before a backward."""
        if self._hooks is not None:
            self._hooks.begin()

    def name_gradients(self) -> None:
        """Say of the gradients there are what they are."""
        for parameter in self._trained:
            if parameter.grad is not None:
                self._tracer.name(parameter.grad, GRADIENTS)

    def finish(self, step: str) -> None:
        """After the last backward of a step."""
        with self._tracer.during(f"{step}, optimizer", OPTIMIZER):
            if self._hooks is None:
                torch.nn.utils.clip_grad_norm_(self._trained, _MAX_NORM)
            self._optimizer.step()
        self._optimizer.zero_grad()


def _count(model: Any, trained_only: bool) -> int:
    """Parameters over all processes; the bytes of a 4-bit layer hold two each."""
    packed = {id(m.packed): m.in_features * m.out_features for m in _four_bit(model)}
    return sum(
        packed.get(id(parameter), parameter.numel())
        for parameter in model.parameters()
        if parameter.requires_grad or not trained_only
    )


def _four_bit(model: Any) -> list[Nf4Linear]:
    return [module for module in model.modules() if isinstance(module, Nf4Linear)]
