"""The element-wise passes of adapted linear layers in torch, C++ and Triton.

    dropout        keep * x / (1 - p), keep from `_philox.py`: drawn again wherever it is needed
    column_scale   z * scale + bias per column, and its backward
    dora_norms     ||w + s B A|| of every row from products with A; C++ and torch only

Each is one pass over memory, arithmetic in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._csrc import library, num_threads
from ._device import HAS_TRITON, resolve_backend
from ._layer_passes import rows_of
from ._philox import random_words, threshold_of

if HAS_TRITON:
    from . import _adapter_passes_triton as passes_triton

__all__ = [
    "MAX_NORM_RANK",
    "column_scale_backward",
    "column_scale_forward",
    "dora_norms",
    "dropout",
    "dropped",
]

# What C++ sums in registers (csrc/adapter_passes.cpp); a library's product serves larger ranks.
MAX_NORM_RANK = 64
# A norm^2 below this share of its positive terms has lost the digits of 16-bit products.
CANCELLATION = 2**-4
LEAST_MAGNITUDE = 1e-30

# Less than this per thread, and waking it costs more than it saves.
_ELEMENTS_PER_THREAD = 1 << 14


def dropout(x: Tensor, p: float, seed: int, backend: str, simd_limit: int = -1) -> Tensor:
    """x [rows, width] with each element zero with probability `p`, the others times 1 / (1 - p)."""
    rows, width = x.shape
    threshold, scale = threshold_of(p), 1 / (1 - p)
    if backend == "triton":
        return passes_triton.dropout(x, seed, threshold, scale)
    if backend == "cpp":
        lib = library()
        assert lib is not None
        x = rows_of(x)
        out = torch.empty(rows, width, dtype=x.dtype)
        lib.fastpost_dropout(
            x.dtype == torch.bfloat16,
            x.data_ptr(),
            x.stride(0),
            rows,
            width,
            seed,
            threshold,
            scale,
            out.data_ptr(),
            simd_limit,
            _threads(x),
        )
        return out
    kept = random_words(seed, rows, width, x.device) >= threshold
    return torch.where(kept, x * scale, torch.zeros_like(x))


def dropped(x: Tensor, p: float, seed: int, backend: str) -> Tensor:
    """`x` itself, or its dropout by what "auto" is here; every backend draws the same mask."""
    return dropout(x, p, seed, resolve_backend(backend, x.device, x.dtype)) if p > 0 else x


def column_scale_forward(
    z: Tensor,  # [rows, width]
    scale: Tensor,  # [width] fp32
    bias: Tensor | None,  # [width]
    backend: str,
    simd_limit: int = -1,
    out: Tensor | None = None,  # [rows, width], contiguous
    norm: Tensor | None = None,  # [width] fp32
) -> Tensor:
    """z * scale + bias in z's dtype, rounded once; `out`, which may be z, takes it.

    With a norm, `scale` is a magnitude to be divided by it; one of zero counts as LEAST_MAGNITUDE:
    what was multiplied by zero could not be found again.
    """
    bias = None if bias is None else bias.to(scale.dtype).contiguous()
    if norm is not None and backend != "cpp":
        scale = off_zero(scale) / norm
    if backend == "triton":
        return passes_triton.column_scale_forward(z, scale, bias, out)
    if backend == "cpp":
        lib = library()
        assert lib is not None
        rows, width = z.shape
        z, scale = rows_of(z), scale.contiguous()
        norm = None if norm is None else norm.contiguous()
        out = torch.empty(rows, width, dtype=z.dtype) if out is None else out
        lib.fastpost_column_scale_forward(
            z.dtype == torch.bfloat16,
            z.data_ptr(),
            z.stride(0),
            rows,
            width,
            scale.data_ptr(),
            None if norm is None else norm.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            simd_limit,
            _threads(z),
        )
        return out
    scaled = z * scale
    scaled = (scaled if bias is None else scaled + bias).to(z.dtype)
    return scaled if out is None else out.copy_(scaled)


def column_scale_backward(
    grad: Tensor,  # [rows, width]
    z: Tensor | None,  # [rows, width], where d scale is needed
    scale: Tensor,  # [width] fp32
    need_z: bool,
    backend: str,
    simd_limit: int = -1,
    norm: Tensor | None = None,  # [width] fp32
) -> tuple[Tensor | None, Tensor | None]:
    """d z [rows, width] and d scale [width] in fp32; None where not needed (`z` None).

    With a norm, `z` is what it was scaled to, and d scale is that of the magnitude.
    """
    if norm is not None and backend != "cpp":
        nonzero = off_zero(scale)
        d_z, sums = column_scale_backward(grad, z, nonzero / norm, need_z, backend)
        return d_z, None if sums is None else sums / nonzero
    if backend == "triton":
        return passes_triton.column_scale_backward(grad, z, scale, need_z)
    if backend == "cpp":
        lib = library()
        assert lib is not None
        rows, width = grad.shape
        grad, scale = rows_of(grad), scale.contiguous()
        norm = None if norm is None else norm.contiguous()
        z = None if z is None else rows_of(z)
        d_z = torch.empty(rows, width, dtype=grad.dtype) if need_z else None
        d_scale = None if z is None else torch.empty(width, dtype=torch.float32)
        lib.fastpost_column_scale_backward(
            grad.dtype == torch.bfloat16,
            grad.data_ptr(),
            grad.stride(0),
            None if z is None else z.data_ptr(),
            0 if z is None else z.stride(0),
            rows,
            width,
            scale.data_ptr(),
            None if norm is None else norm.data_ptr(),
            None if d_z is None else d_z.data_ptr(),
            None if d_scale is None else d_scale.data_ptr(),
            simd_limit,
            _threads(grad),
        )
        return d_z, d_scale
    d_scale = None if z is None else (grad.to(scale.dtype) * z).sum(0)
    return (grad * scale).to(grad.dtype) if need_z else None, d_scale


def off_zero(magnitude: Tensor) -> Tensor:
    """The magnitude with LEAST_MAGNITUDE in the place of zeros."""
    return magnitude.masked_fill(magnitude == 0, LEAST_MAGNITUDE)


def dora_norms(
    cross: Tensor,  # [rows, rank], w A^T
    b: Tensor,  # [rows, rank] fp32 or fp64, as all below
    gram: Tensor,  # [rank, rank], A A^T
    squares: Tensor,  # [rows], ||w||^2
    scale: float,
    backend: str,
    simd_limit: int = -1,
) -> Tensor:
    """||w + scale b A|| [rows], -1 where the terms cancel and the norm is to be taken directly."""
    if backend == "cpp" and len(gram) <= MAX_NORM_RANK:
        lib = library()
        assert lib is not None
        cross, b, gram = cross.contiguous(), b.contiguous(), gram.contiguous()
        out = torch.empty_like(squares)
        lib.fastpost_dora_norms(
            cross.dtype == torch.bfloat16,
            cross.data_ptr(),
            b.data_ptr(),
            gram.data_ptr(),
            squares.data_ptr(),
            *cross.shape,
            scale,
            CANCELLATION,
            out.data_ptr(),
            simd_limit,
            _threads(cross),
        )
        return out
    terms = squares + scale * scale * ((b @ gram) * b).sum(1)
    found = terms + 2 * scale * (cross.to(b.dtype) * b).sum(1)
    return torch.where(found < CANCELLATION * terms, -1.0, found.sqrt())


def _threads(tensor: Tensor) -> int:
    return max(1, min(num_threads(), tensor.numel() // _ELEMENTS_PER_THREAD))
