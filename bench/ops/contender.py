"""What competes: several programs for one op at one shape, and the truth they must agree with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Case", "Contender", "Results", "forward_backward"]

# Values and gradients by name: what a contender computed.
Results = dict[str, Tensor]


class Contender(NamedTuple):
    """One program. A floor computes what no program can avoid, and has no results to check.

    `unpack` brings what `run` returned into the layout of the truth; it is not timed."""

    name: str
    run: Callable[[], Results]  # forward and backward from the case's own tensors
    is_floor: bool = False
    gpu_only: bool = False
    unpack: Callable[[Results], Results] | None = None


class Case(NamedTuple):
    """One op at one shape. `baseline` is the plain program in the contenders' dtype: its error is
    what theirs is judged by."""

    op: str
    shape: str
    truth: Callable[[], Results]  # in float64
    baseline: Callable[[], Results]
    contenders: tuple[Contender, ...]  # the floor comes first
    dtype: torch.dtype = torch.bfloat16


def forward_backward(
    program: Callable[..., Tensor], inputs: dict[str, Tensor], grad: Tensor | None = None
) -> Callable[[], Results]:
    """Runs `program` on the inputs in their order, and its backward from `grad`, which may be None
    for a scalar. Results are "output" and "d <name>" of every input that requires a gradient."""
    names = [name for name, tensor in inputs.items() if tensor.requires_grad]

    def run() -> Results:
        output = program(*inputs.values())
        grads = torch.autograd.grad(output, [inputs[name] for name in names], grad)
        gradients = {f"d {name}": found for name, found in zip(names, grads, strict=True)}
        return {"output": output.detach()} | gradients

    return run
