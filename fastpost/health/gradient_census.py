"""What became of every trainable tensor's gradient in one optimizer step.

The trainer clips before it calls back, and clipping by a norm of NaN turns every gradient into NaN.
So gradients are looked at as they are made: a hook on each tensor keeps its largest magnitude, one
pass over the gradient and one number, on the device. The numbers are read once per optimizer step,
which is the only time that the host waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle


class GradientState(IntEnum):
    """In an order whose maximum over ranks is the state of the whole tensor."""

    ABSENT = 0
    ZERO = 1
    ALIVE = 2
    NON_FINITE = 3


def largest_magnitude(values: Tensor) -> Tensor:
    """max |x| as a scalar tensor, NaN if there is one. Seven times faster than the infinity norm,
    which the CPU does not vectorise."""
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high)


@dataclass(frozen=True)
class GradientReport:
    """States of all trainable tensors after one optimizer step's backward passes.

    Attributes:
        step: optimizer steps done before this one, plus one.
        states: name -> state, in the order of `named_parameters`, which is the network's.
        learning_rate: of the step, None where unknown.
    """

    step: int
    states: dict[str, GradientState]
    learning_rate: float | None = None

    def names(self, *states: GradientState) -> list[str]:
        return [name for name, state in self.states.items() if state in states]


class GradientCensus:
    """Hooks on the trainable tensors of a model; `read` gives and forgets a step's states."""

    def __init__(self, model: nn.Module) -> None:
        self._names: list[str] = []
        self._largest: list[Tensor | None] = []
        self._handles: list[RemovableHandle] = []
        self._device = torch.device("cpu")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(self._watch(len(self._names), parameter))
                self._names.append(name)
                self._device = parameter.device

    def _watch(self, index: int, parameter: nn.Parameter) -> RemovableHandle:
        self._largest.append(None)

        def keep_largest(parameter: Tensor) -> None:
            gradient = parameter.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            if local is not None and local.numel():
                self._largest[index] = largest_magnitude(local.detach())

        return parameter.register_post_accumulate_grad_hook(keep_largest)

    def read(self, step: int, learning_rate: float | None = None) -> GradientReport:
        """States since the last call, the same on every rank."""
        nothing = torch.full((), -1.0, device=self._device)
        largest = torch.stack(
            [
                nothing if value is None else value.to(self._device, torch.float32)
                for value in self._largest
            ]
            or [nothing]
        )
        self._largest = [None] * len(self._names)
        codes = torch.where(largest > 0, GradientState.ALIVE, GradientState.ZERO)
        codes = torch.where(largest < 0, GradientState.ABSENT, codes)
        codes = torch.where(largest.isfinite(), codes, GradientState.NON_FINITE)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(codes, dist.ReduceOp.MAX)
        states = [GradientState(code) for code in codes.tolist()]
        return GradientReport(
            step, dict(zip(self._names, states[: len(self._names)], strict=True)), learning_rate
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def non_finite_weights(model: nn.Module) -> Iterator[str]:
    """Names of tensors that hold NaN or infinity already (of this rank's shard under FSDP2)."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.is_floating_point() and not bool(local.isfinite().all()):
            yield name


__all__ = [
    "GradientCensus",
    "GradientReport",
    "GradientState",
    "largest_magnitude",
    "non_finite_weights",
]
