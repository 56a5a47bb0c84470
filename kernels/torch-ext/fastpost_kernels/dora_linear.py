"""A linear layer with a DoRA adapter: magnitude and direction of the weight, without forming it.

    y  = m / n * (x W^T + s u B^T) + bias,   u = drop(x) A^T,   n_j = ||W + s B A||_j  (row j)
    dz = m / n * dy,   dm = 1 / n * sum over rows of dy z,   n is a constant (paper, section 4.3)

Strategy. z = x W^T + s u B^T is `lora_linear`, or `nf4_linear` for a 4-bit weight; one pass scales
its columns and adds the bias, and one pass backwards makes dz and the sums for dm. PEFT runs an
identity matrix through A and B to get B A, adds it to a (dequantised) copy of W and takes the norm,
at every call.
The norm here is factored:

    n^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>      per row

||W||^2 is a constant of the frozen weight; the rest costs 2 N K r FLOPs, once per optimizer step
instead of once per micro-batch; on CPUs all but the products W A^T and A A^T is one C++ pass. The
sum cancels where W + sBA almost vanishes: rows of which less than CANCELLATION of the terms is left
are computed from W + sBA itself, row by row.
Rejected: folding m / n into W: a second copy of it, rounded. Where the caller says that nobody else
has z, y takes its memory and is kept in its place, dm = 1 / m * sum over rows of dy y: what reads y
next (attention, an MLP's activation) often keeps it too, and then it is held once.

FLOPs: those of `lora_linear`; 2 r (N K + r (N + K)) per norm. Kept for the backward beyond
`lora_linear`: z or y [M, N] (PEFT keeps two such). Legend: M rows, K inputs, N outputs, r rank.
Source: Liu et al., "DoRA" (arXiv:2402.09353), equations 5, 6 and 11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._adapter_passes import column_scale_backward, column_scale_forward, dora_norms
from ._cost import register_costs
from ._device import resolve_backend
from ._eager_node import DirectOp, is_watched
from ._layer_passes import rows_of
from ._namespace import add_op_namespace_prefix
from ._nf4_format import Nf4Weight
from ._nf4_unpack import WeightTiles
from ._vocab_tiles import statistics_dtype
from .lora_linear import lora_linear
from .nf4_linear import nf4_linear

__all__ = [
    "dora_linear",
    "dora_weight_norm",
    "row_square_norms",
    "scale_columns",
    "scale_own_columns",
]


def _column(magnitude: Tensor, weight_norm: Tensor, dtype: torch.dtype) -> Tensor:
    wide = statistics_dtype(dtype)
    return magnitude.to(wide) / weight_norm.to(wide)


def _scale(
    z: Tensor,  # [M, N]
    magnitude: Tensor,  # [N]
    weight_norm: Tensor,  # [N]
    bias: Tensor | None,  # [N]
    backend: str,
) -> Tensor:
    """z * magnitude / weight_norm + bias."""
    backend = resolve_backend(backend, z.device, z.dtype)
    with torch.cuda.device_of(z):
        return column_scale_forward(z, _column(magnitude, weight_norm, z.dtype), bias, backend)


column_scale_fwd = torch.library.custom_op(
    add_op_namespace_prefix("column_scale_fwd"), mutates_args=()
)(_scale)


@column_scale_fwd.register_fake
def _(
    z: Tensor, magnitude: Tensor, weight_norm: Tensor, bias: Tensor | None, backend: str
) -> Tensor:
    return z.new_empty(z.shape)


def _scale_gradients(
    grad: Tensor,
    z: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    need_z: bool,
    need_magnitude: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """d z and d magnitude, in the dtype of each; the one not needed has no elements."""
    backend = resolve_backend(backend, z.device, z.dtype)
    column = _column(magnitude, weight_norm, z.dtype)
    with torch.cuda.device_of(z):
        d_z, d_column = column_scale_backward(
            grad, z if need_magnitude else None, column, need_z, backend
        )
    return (
        z.new_empty(0) if d_z is None else d_z,
        magnitude.new_empty(0)
        if d_column is None
        else (d_column / weight_norm.to(d_column.dtype)).to(magnitude.dtype),
    )


column_scale_bwd = torch.library.custom_op(
    add_op_namespace_prefix("column_scale_bwd"), mutates_args=()
)(_scale_gradients)


@column_scale_bwd.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    need_z: bool,
    need_magnitude: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        z.new_empty(z.shape if need_z else (0,)),
        magnitude.new_empty(magnitude.shape if need_magnitude else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, magnitude, weight_norm, bias, ctx.backend = inputs
    ctx.save_for_backward(z, magnitude, weight_norm)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_z, need_magnitude, _, need_bias, _ = ctx.needs_input_grad
    d_z, d_magnitude = _call_scale_gradients(
        grad, *ctx.saved_tensors, need_z, need_magnitude, ctx.backend
    )
    return (
        d_z if need_z else None,
        d_magnitude if need_magnitude else None,
        None,
        grad.sum(0, dtype=ctx.bias_dtype) if need_bias else None,
        None,
    )


_call_scale_gradients = DirectOp(column_scale_bwd, _scale_gradients)
_call_scale = DirectOp(column_scale_fwd, _scale, (0, 1, 3), _setup_context, _backward)


class _ScaleOver(torch.autograd.Function):
    """z * magnitude / weight_norm in the memory of z, which is kept as it is then: several at once,
    for a node of autograd costs as much as a pass over a few hundred rows."""

    @staticmethod
    def forward(ctx: Any, norms: list[Tensor], backend: str, *leaves: Tensor) -> Any:
        count = len(norms)
        zs, ctx.dtypes = leaves[:count], [m.dtype for m in leaves[count:]]
        wide = [m.to(norm.dtype) for m, norm in zip(leaves[count:], norms, strict=True)]
        with torch.cuda.device_of(zs[0]):
            ys = [
                column_scale_forward(z, m, None, backend, out=z, norm=norm).detach()
                for z, m, norm in zip(zs, wide, norms, strict=True)
            ]
        ctx.save_for_backward(*ys, *wide, *norms)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count, saved = len(grads), ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        d_zs: list[Tensor | None] = [None] * count
        d_magnitudes: list[Tensor | None] = [None] * count
        with torch.cuda.device_of(saved[0]):
            for i, grad in enumerate(grads):
                if grad is None:
                    continue
                y, wide, norm = saved[i::count]
                d_zs[i], found = column_scale_backward(
                    grad, y if needs[count + i] else None, wide, needs[i], ctx.backend, norm=norm
                )
                d_magnitudes[i] = None if found is None else found.to(ctx.dtypes[i])
        return None, None, *d_zs, *d_magnitudes


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0  # torch's counter counts multiplications of matrices only


def _forward_workspace(
    z: Tensor, magnitude: Tensor, weight_norm: Tensor, bias: Tensor | None, backend: str
) -> int:
    itemsize = statistics_dtype(z.dtype).itemsize
    wide = 2 * z.numel() * itemsize if backend == "torch" else 0
    return wide + _row_copies(z) + 5 * magnitude.numel() * itemsize


def _backward_workspace(
    grad: Tensor,
    z: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    need_z: bool,
    need_magnitude: bool,
    backend: str,
) -> int:
    itemsize = statistics_dtype(z.dtype).itemsize
    wide = 3 * z.numel() * itemsize if backend == "torch" else 0
    partials = (len(z) // 512 + 5) * magnitude.numel() * itemsize
    return wide + partials + _row_copies(grad, z)


def _row_copies(*matrices: Tensor) -> int:
    return sum(m.numel() * m.itemsize for m in matrices if rows_of(m) is not m)


register_costs(column_scale_fwd, flops=_no_flops, workspace=_forward_workspace)
register_costs(column_scale_bwd, flops=_no_flops, workspace=_backward_workspace)


@torch.no_grad()
def dora_weight_norm(
    weight: Tensor | Nf4Weight,  # [N, K]
    a: Tensor,  # [r, K]
    b: Tensor,  # [N, r]
    scale: float,
    square_norm: Tensor | None = None,  # [N]
) -> Tensor:
    """`||W + scale B A||` of every row, [N] in float32 (float64 for float64), without gradient.

    Args:
        weight, a, b: of any floating dtypes. W A^T is multiplied in the weight's dtype (that of
            `a`, at least bfloat16, for a 4-bit one, unpacked tile by tile), all else in float32.
        scale: alpha / r.
        square_norm: ||W||^2 of every row, [N] in float32, where the caller keeps it; computed here
            if None.

    Raises:
        ValueError: shapes that do not fit.
    """
    outputs, inputs = weight.shape
    if a.dim() != 2 or a.shape[1] != inputs or b.shape != (outputs, a.shape[0]):
        raise ValueError(
            f"weight is [N={outputs}, K={inputs}]: expected a [r, {inputs}] and "
            f"b [{outputs}, {len(a)}], got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if square_norm is None:
        square_norm = row_square_norms(weight)
    wide = square_norm.dtype
    a_wide, b_wide = a.to(wide), b.to(wide)
    norms = []
    kind = square_norm.device.type
    # autocast would round the fp32 products too
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        gram = a_wide @ a_wide.t()
        for part, rows in _row_tiles(weight, a.dtype):
            cross = rows @ a.to(rows.dtype).t()
            # who counts products is shown all of them
            is_single = wide == torch.float32 and not is_watched((cross,))
            backend = resolve_backend("auto", cross.device, cross.dtype) if is_single else "torch"
            found = dora_norms(cross, b_wide[part], gram, square_norm[part], scale, backend)
            lost = found < 0
            if bool(lost.any()):
                exact = rows[lost].to(wide) + scale * (b_wide[part][lost] @ a_wide)
                found[lost] = torch.linalg.vector_norm(exact, dim=1)
            norms.append(found)
    return norms[0] if len(norms) == 1 else torch.cat(norms)


@torch.no_grad()
def row_square_norms(weight: Tensor | Nf4Weight) -> Tensor:
    """||W||^2 of every row, [N] in float32 (float64 for float64): what a layer may keep."""
    norms = [
        torch.linalg.vector_norm(rows, dim=1, dtype=statistics_dtype(rows.dtype)).square()
        for _, rows in _row_tiles(weight, torch.float32)
    ]
    return torch.cat(norms)


def _row_tiles(weight: Tensor | Nf4Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows [n, K] of `weight` with their places; a 4-bit one is unpacked in `dtype`."""
    if isinstance(weight, Tensor):
        return iter([(slice(0, len(weight)), weight)])
    backend = resolve_backend("auto", weight.packed.device, dtype)
    return WeightTiles(weight, dtype, backend).by_rows()


def dora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor | Nf4Weight,  # [N, K]
    bias: Tensor | None,  # [N]
    a: Tensor,  # [r, K]
    b: Tensor,  # [N, r]
    scale: float,
    magnitude: Tensor,  # [N]
    weight_norm: Tensor,  # [N]
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`magnitude / weight_norm * (x W^T + scale (dropout(x) A^T) B^T) + bias`, [..., N].

    Args:
        magnitude: m [N], trained.
        weight_norm: n [N], from `dora_weight_norm`: a constant of the step.
        The others as in `lora_linear`. With dropout PEFT drops the input of W and A alike; here, as
            in the paper, only the adapter's.

    Raises:
        ValueError, TypeError: as `lora_linear`; a magnitude or norm that is not [N].
    """
    _check_columns(weight.shape[0], magnitude, weight_norm)
    flat = x if x.dim() < 3 else x.reshape(-1, x.shape[-1])
    if isinstance(weight, Nf4Weight):
        z = nf4_linear(
            flat, weight, a=a, b=b, scale=scale, dropout_p=dropout_p, seed=seed, backend=backend
        )
    else:
        z = lora_linear(
            flat, weight, None, a, b, scale, dropout_p=dropout_p, seed=seed, backend=backend
        )
    y = scale_columns(z, magnitude, weight_norm, bias, backend=backend)
    return y if x.dim() < 3 else y.view(*x.shape[:-1], y.shape[-1])


def scale_columns(
    z: Tensor,  # [..., N]
    magnitude: Tensor,  # [N]
    weight_norm: Tensor,  # [N]
    bias: Tensor | None,  # [N]
    *,
    backend: str = "auto",
) -> Tensor:
    """`magnitude / weight_norm * z + bias`: DoRA from what `lora_linears` gives without a bias.

    Raises:
        ValueError: a magnitude or norm that is not [N].
    """
    _check_columns(z.shape[-1], magnitude, weight_norm)
    # a view is one more node of autograd
    flat = z if z.dim() == 2 else z.view(-1, z.shape[-1])
    norm = weight_norm.detach()
    y = _call_scale(flat, magnitude, norm, bias, backend)
    return y if z.dim() == 2 else y.view(z.shape)


def scale_own_columns(
    zs: Sequence[Tensor],  # each [M, N_i]
    magnitudes: Sequence[Tensor],  # each [N_i]
    weight_norms: Sequence[Tensor],  # each [N_i]
    *,
    backend: str = "auto",
) -> list[Tensor]:
    """`magnitude / weight_norm * z` of each, for z that nobody else has and results that nothing
    changes in place: where it can, a result takes the memory of its z and is kept in its place.

    Raises:
        ValueError: a magnitude or norm that is not [N_i].
    """
    groups = list(zip(zs, magnitudes, weight_norms, strict=True))
    for z, magnitude, norm in groups:
        _check_columns(z.shape[-1], magnitude, norm)
    wide = statistics_dtype(zs[0].dtype)
    # float16 has no room for the result of a magnitude near zero
    can_overwrite = all(z.dtype != torch.float16 and z.dim() == 2 and z.is_contiguous() for z in zs)
    if not can_overwrite or is_watched((*zs, *magnitudes, *weight_norms)):
        return [scale_columns(*group, None, backend=backend) for group in groups]
    norms = [norm.detach().to(wide) for norm in weight_norms]
    backend = resolve_backend(backend, zs[0].device, zs[0].dtype)
    return list(_ScaleOver.apply(norms, backend, *zs, *magnitudes))


def _check_columns(outputs: int, magnitude: Tensor, weight_norm: Tensor) -> None:
    for name, vector in (("magnitude", magnitude), ("weight_norm", weight_norm)):
        if vector.shape != (outputs,):
            raise ValueError(f"expected {name} [{outputs}], got {tuple(vector.shape)}")
