"""A linear layer whose weight gradient runs at a GEMM's speed on CPUs.

    y = x W^T + b,   dx = dy W,   dW = dy^T x,   db = sum over rows of dy

Strategy. All three products are the library's. In dW the left operand lies transposed, and a 16-bit
CPU GEMM then packs it element by element: at the sizes of a small language model it reaches 1.1 to
1.5 TFLOP/s where the other two reach 2.6. One pass over dy writes a transposed copy first, and the
same GEMM on it takes 0.45 to 0.8 of the time by shape, the copy included (on two AMX cores;
bench/ops/bench_linear.py). Shapes for which it was not measured faster take the library's own path;
so do CPUs without AMX, GPUs, fp32, and layers without a weight gradient.
Rejected: transposing x instead, whose result has to be transposed back.

Legend: M rows, K inputs, N outputs. FLOPs: 2 M N K each. Bytes of the copy: 4 M N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._cost import register_costs
from ._csrc import library
from ._namespace import add_op_namespace_prefix
from ._transposed_product import has_matrix_unit, transposed

__all__ = ["linear"]

# Measured on two AMX cores: between these the library's split over threads, not packing, is what
# limits square weights.
_LARGE_WEIGHT = 800_000
_TALL = 2
# Below this many multiplications the copy and its call cost what they save.
_MIN_WORK = 200_000_000


def is_faster_transposed(rows: int, weight: torch.Size) -> bool:
    """Whether dW of `weight` [N, K] from `rows` rows was measured faster through the copy."""
    outputs, inputs = weight
    is_tall = max(outputs, inputs) >= _TALL * min(outputs, inputs)
    is_enough = rows * outputs * inputs >= _MIN_WORK
    return is_enough and (outputs * inputs >= _LARGE_WEIGHT or is_tall)


@torch.library.custom_op(add_op_namespace_prefix("weight_gradient"), mutates_args=())
def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x, [N, K], of bf16 CPU tensors grad [M, N] and x [M, K]."""
    return transposed(grad) @ x


@weight_gradient.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1])


def _flops(grad: torch.Size, x: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]


def _workspace(grad: Tensor, x: Tensor) -> int:
    copies = 1 if grad.stride(1) == 1 else 2
    return copies * grad.numel() * grad.element_size()


register_costs(weight_gradient, flops=_flops, workspace=_workspace)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, _, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if need_x else None,
            weight_gradient(rows, x.reshape(-1, x.shape[-1])),
            rows.sum(0) if need_bias else None,
        )


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """`torch.nn.functional.linear(x, weight, bias)`, with a faster weight gradient on CPUs.

    Args:
        x: [..., K], any floating dtype and device.
        weight: [N, K].
        bias: [N] or None.

    Returns:
        [..., N]. Where the faster gradient serves (bf16 on a CPU with AMX, a weight that needs a
        gradient, no autocast, `is_faster_transposed`) it is differentiable once; else it is
        torch's own.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, from torch.
    """
    rows = x.numel() // max(1, x.shape[-1])
    serves = (
        weight.requires_grad
        and x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and torch.is_grad_enabled()
        and has_matrix_unit()
        and is_faster_transposed(rows, weight.shape)
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )
    if not serves:
        return functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)
