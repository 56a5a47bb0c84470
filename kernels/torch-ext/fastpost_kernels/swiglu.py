"""The gated activation of a Llama MLP, silu(gate) * up, in one pass over memory.

    y = round(gate sigma(gate)) * up
    d up = dy gate sigma(gate),   d gate = dy up sigma(gate) (1 + gate (1 - sigma(gate)))

Strategy. Eager code writes silu(gate) and reads it back, and keeps it for the backward beside gate
and up. Here gate and up are read once, y written once, and only gate and up are kept: the backward
recomputes the sigmoid, one exponential that the memory traffic hides. `round` is to the dtype of
gate, where eager code rounds too. Rejected: fusing into the GEMMs around it, which on CPUs are a
library's.

Legend: I intermediate width. Bytes: 3 rows I forward, 5 rows I backward, times the element size.
Source: Shazeer, "GLU variants improve transformer" (arXiv:2002.05202), equation 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _layer_passes as passes
from ._cost import register_costs
from ._namespace import add_op_namespace_prefix

__all__ = ["swiglu"]


@torch.library.custom_op(add_op_namespace_prefix("swiglu_fwd"), mutates_args=())
def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of CPU tensors [rows, I]."""
    return passes.swiglu_forward(gate, up)


@swiglu_fwd.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op(add_op_namespace_prefix("swiglu_bwd"), mutates_args=())
def swiglu_bwd(
    grad: Tensor, gate: Tensor, up: Tensor, need_gate: bool, need_up: bool
) -> tuple[Tensor, Tensor]:
    """d gate and d up; the one not needed has no elements."""
    d_gate, d_up = passes.swiglu_backward(grad, gate, up, need_gate, need_up)
    return (
        gate.new_empty(0) if d_gate is None else d_gate,
        gate.new_empty(0) if d_up is None else d_up,
    )


@swiglu_bwd.register_fake
def _(
    grad: Tensor, gate: Tensor, up: Tensor, need_gate: bool, need_up: bool
) -> tuple[Tensor, Tensor]:
    return (
        gate.new_empty(gate.shape if need_gate else (0,)),
        gate.new_empty(gate.shape if need_up else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    need_gate, need_up = ctx.needs_input_grad
    d_gate, d_up = swiglu_bwd(grad, *ctx.saved_tensors, need_gate, need_up)
    return d_gate if need_gate else None, d_up if need_up else None


swiglu_fwd.register_autograd(_backward, setup_context=_setup_context)


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0  # torch's counter counts multiplications of matrices only


def _forward_workspace(gate: Tensor, up: Tensor) -> int:
    return passes.copy_bytes(gate, up)


def _backward_workspace(
    grad: Tensor, gate: Tensor, up: Tensor, need_gate: bool, need_up: bool
) -> int:
    return passes.copy_bytes(grad, gate, up)


register_costs(swiglu_fwd, flops=_no_flops, workspace=_forward_workspace)
register_costs(swiglu_bwd, flops=_no_flops, workspace=_backward_workspace)


def swiglu(
    gate: Tensor,  # [..., I]
    up: Tensor,  # [..., I]
    *,
    backend: str = "auto",
) -> Tensor:
    """`silu(gate) * up`, [..., I]; equals `torch.nn.functional.silu(gate) * up`.

    Args:
        gate, up: [..., I] of one shape, floating dtype and device.
        backend: "cpp" (CPU, float32 and bfloat16), "torch" (any device, the program above under
            autograd) or "auto": "cpp" where it can run. GPUs get "torch": they have fused layers
            from Liger and the Kernel Hub.

    Returns:
        [..., I] in their dtype, differentiable once in both. Keeps only `gate` and `up`.

    Raises:
        ValueError: shapes or devices that differ, a scalar, a backend that cannot run here.
        TypeError: dtypes that are not floating or differ.
    """
    if gate.shape != up.shape or gate.dim() == 0:
        raise ValueError(
            f"gate and up must have one shape [..., I], got {tuple(gate.shape)} and "
            f"{tuple(up.shape)}"
        )
    if not gate.dtype.is_floating_point or gate.dtype != up.dtype:
        raise TypeError(
            f"gate and up must have one floating dtype, got {gate.dtype} and {up.dtype}; cast one"
        )
    if gate.device != up.device:
        raise ValueError(f"gate is on {gate.device}, up on {up.device}; move one of them")
    if passes.choose_backend(backend, gate) == "torch":
        return torch.nn.functional.silu(gate) * up
    if gate.numel() == 0:  # a width of 0 cannot be flattened; nothing to compute either way
        return gate * up
    width = gate.shape[-1]
    return swiglu_fwd(gate.reshape(-1, width), up.reshape(-1, width)).view(gate.shape)
