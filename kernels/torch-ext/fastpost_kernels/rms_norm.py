"""Root-mean-square normalisation in one pass over memory, as Llama's.

    y = round(x rstd) * weight,   rstd = 1 / sqrt(mean(x^2) + eps)
    d x = rstd (g - x rstd^2 mean(g x)),  g = dy * weight
    d weight = sum_rows dy x rstd

Strategy. Eager code walks the rows eight times forward and about twelve times backward, through
fp32 temporaries. Here a row is widened into L1, normalised and narrowed: x is read once and y
written once; the backward reads x and dy once. Only x (which the layer keeps anyway) and rstd are
saved. `round` is to the dtype of x, where transformers' LlamaRMSNorm rounds too. d weight is summed
over blocks of rows of a fixed size, then over blocks: the same bits for any number of threads.
Rejected: recomputing rstd in the backward, which saves 4 bytes a row for another pass.

Legend: H width. Bytes: 2 rows H forward, 3 rows H backward, times the element size.
Source: Zhang and Sennrich, "Root mean square layer normalization" (arXiv:1910.07467), equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _layer_passes as passes
from ._cost import register_costs
from ._csrc import num_threads
from ._namespace import add_op_namespace_prefix

__all__ = ["rms_norm"]

# Blocks of rows whose sums of d weight are kept; kMaxBlocks in csrc/layer_passes.cpp.
_MAX_BLOCKS = 128


@torch.library.custom_op(add_op_namespace_prefix("rms_norm_fwd"), mutates_args=())
def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [rows, H] and rstd [rows] of CPU tensors."""
    return passes.rms_norm_forward(x, weight, eps)


@rms_norm_fwd.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("rms_norm_bwd"), mutates_args=())
def rms_norm_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """d x and d weight; the one not needed has no elements."""
    d_x, d_weight = passes.rms_norm_backward(grad, x, weight, rstd, need_x, need_weight)
    return (
        x.new_empty(0) if d_x is None else d_x,
        x.new_empty(0) if d_weight is None else d_weight,
    )


@rms_norm_bwd.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)  # no zeros for rstd, which nothing differentiates


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, rstd = ctx.saved_tensors
    need_x, need_weight, _ = ctx.needs_input_grad
    d_x, d_weight = rms_norm_bwd(grad, x, weight, rstd, need_x, need_weight)
    return d_x if need_x else None, d_weight if need_weight else None, None


rms_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0  # torch's counter counts multiplications of matrices only


def _forward_workspace(x: Tensor, weight: Tensor, eps: float) -> int:
    width = x.shape[1]
    rows_and_weight = 4 * width * (num_threads() + 1)
    return passes.copy_bytes(x) + weight.nbytes + rows_and_weight


def _backward_workspace(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_x: bool, need_weight: bool
) -> int:
    width = x.shape[1]
    rows_and_weight = 4 * width * (2 * num_threads() + 1)
    partials = 4 * width * _MAX_BLOCKS if need_weight else 0
    return passes.copy_bytes(grad, x) + weight.nbytes + rows_and_weight + partials


register_costs(rms_norm_fwd, flops=_no_flops, workspace=_forward_workspace)
register_costs(rms_norm_bwd, flops=_no_flops, workspace=_backward_workspace)


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight


def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))` over the last dimension, [..., H].

    Equals, up to the last bit of bfloat16:

        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    Args:
        x: [..., H], any floating dtype.
        weight: [H], the dtype of `x`.
        eps: added to the mean square, not negative.
        backend: "cpp" (CPU, float32 and bfloat16), "torch" (any device, the program above under
            autograd, float64 kept) or "auto": "cpp" where it can run. GPUs get "torch": they have
            fused layers from Liger and the Kernel Hub.

    Returns:
        [..., H] in the dtype of `x`, differentiable once in `x` and `weight`. NaN stays in its row.

    Raises:
        ValueError: shapes or devices that do not fit, a negative `eps`, a backend that cannot run.
        TypeError: dtypes that are not floating or differ.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:] or weight.numel() == 0:
        raise ValueError(
            f"weight must be [H] for x [..., H] with H > 0, got weight {tuple(weight.shape)} and "
            f"x {tuple(x.shape)}"
        )
    if not x.dtype.is_floating_point or weight.dtype != x.dtype:
        raise TypeError(
            f"x and weight must have one floating dtype, got {x.dtype} and {weight.dtype}; cast one"
        )
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}; move one of them")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if passes.choose_backend(backend, x) == "torch":
        return _rms_norm_torch(x, weight, eps)
    y, _ = rms_norm_fwd(x.reshape(-1, x.shape[-1]), weight, eps)
    return y.view(x.shape)
