"""Optimizers by what they allocate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["SizedAdamW8bit", "make_optimizer"]

_BLOCK = 256  # elements that share a scale
_SMALL = 4096  # elements below which states stay fp32


class SizedAdamW8bit:
    """The states of an 8-bit AdamW, as sizes: it makes them at the first step and computes nothing.

    A trained tensor of n >= 4096 elements has two states of n bytes and of one fp32 scale for 256
    elements each, 2.03 bytes an element; a smaller one has two fp32 states.

    Source: Dettmers et al., "8-bit optimizers" (arXiv:2110.02861), section 2.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self.state: dict[int, dict[str, Tensor]] = {}

    def step(self) -> None:
        """Make the states, once."""
        for i, parameter in enumerate(self._parameters):
            if i not in self.state and parameter.grad is not None:
                self.state[i] = _states(parameter)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self._parameters:
            parameter.grad = None


def make_optimizer(name: str, parameters: list[Tensor]) -> Any:
    """The optimizer `name` of `request.OPTIMIZERS`: "adamw" is PyTorch's fused one."""
    if name == "adamw_8bit":
        return SizedAdamW8bit(parameters)
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def _states(parameter: Tensor) -> dict[str, Tensor]:
    local: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    count = local.numel()
    if count < _SMALL:
        return {name: torch.empty(count) for name in ("exp_avg", "exp_avg_sq")}
    states = {}
    for name in ("exp_avg", "exp_avg_sq"):
        states[name] = torch.empty(count, dtype=torch.uint8)
        states[name + "_scale"] = torch.empty(-(-count // _BLOCK))
    return states
