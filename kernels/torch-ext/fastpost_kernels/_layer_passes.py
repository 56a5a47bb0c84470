"""Launchers of csrc/layer_passes.cpp and what its ops share: layout of rows, backend, threads."""

from __future__ import annotations

import torch
from torch import Tensor

from ._csrc import library, num_threads

__all__ = [
    "choose_backend",
    "copy_bytes",
    "rms_norm_backward",
    "rms_norm_forward",
    "rows_of",
    "swiglu_backward",
    "swiglu_forward",
]

BACKENDS = ("auto", "cpp", "torch")
# Less than this per thread, and waking it costs more than it saves.
_ELEMENTS_PER_THREAD = 1 << 14


@torch.compiler.assume_constant_result  # torch.compile cannot trace the opening of a library
def _is_built() -> bool:
    return library() is not None


def choose_backend(backend: str, tensor: Tensor) -> str:
    """ "cpp" or "torch". `auto` is C++ for fp32 and bf16 on CPUs, torch everywhere else.

    Raises:
        ValueError: "cpp" where it cannot run; an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    is_cpu, is_single = tensor.device.type == "cpu", tensor.dtype in (torch.float32, torch.bfloat16)
    if backend == "auto":
        return "cpp" if is_cpu and is_single and _is_built() else "torch"
    if backend == "cpp" and not is_single:
        raise ValueError(f"backend 'cpp' computes in float32 or bfloat16, got {tensor.dtype}")
    if backend == "cpp" and not is_cpu:
        raise ValueError(f"backend 'cpp' needs CPU tensors, got device {tensor.device}")
    if backend == "cpp" and not _is_built():
        raise ValueError("backend 'cpp' needs the compiled csrc library; use 'auto' or 'torch'")
    return backend


def rows_of(tensor: Tensor) -> Tensor:
    """`tensor` [rows, width] itself if each row is contiguous, else a copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def copy_bytes(*tensors: Tensor) -> int:
    """Bytes that `rows_of` allocates for `tensors`."""
    return sum(t.numel() * t.element_size() for t in tensors if t.stride(1) != 1)


def _threads(tensor: Tensor) -> int:
    return max(1, min(num_threads(), tensor.numel() // _ELEMENTS_PER_THREAD))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rms_norm_forward(
    x: Tensor,  # [rows, width]
    weight: Tensor,  # [width]
    eps: float,
    simd_limit: int = -1,
) -> tuple[Tensor, Tensor]:
    """y [rows, width] and rstd [rows] in fp32."""
    lib = library()
    assert lib is not None
    rows, width = x.shape
    x, weight = rows_of(x), weight.contiguous()
    y = torch.empty(rows, width, dtype=x.dtype)
    rstd = torch.empty(rows, dtype=torch.float32)
    lib.fastpost_rms_norm_forward(
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        x.stride(0),
        rows,
        width,
        weight.data_ptr(),
        eps,
        y.data_ptr(),
        rstd.data_ptr(),
        simd_limit,
        _threads(x),
    )
    return y, rstd


def rms_norm_backward(
    grad: Tensor,  # [rows, width]
    x: Tensor,
    weight: Tensor,  # [width]
    rstd: Tensor,  # [rows] fp32
    need_x: bool,
    need_weight: bool,
    simd_limit: int = -1,
) -> tuple[Tensor | None, Tensor | None]:
    """d x [rows, width] and d weight [width]; None where not needed."""
    lib = library()
    assert lib is not None
    rows, width = x.shape
    grad, x, weight = rows_of(grad), rows_of(x), weight.contiguous()
    d_x = torch.empty(rows, width, dtype=x.dtype) if need_x else None
    d_weight = torch.empty(width, dtype=x.dtype) if need_weight else None
    lib.fastpost_rms_norm_backward(
        x.dtype == torch.bfloat16,
        grad.data_ptr(),
        grad.stride(0),
        x.data_ptr(),
        x.stride(0),
        rows,
        width,
        weight.data_ptr(),
        rstd.data_ptr(),
        _pointer(d_x),
        _pointer(d_weight),
        simd_limit,
        _threads(x),
    )
    return d_x, d_weight


def swiglu_forward(gate: Tensor, up: Tensor, simd_limit: int = -1) -> Tensor:
    """silu(gate) * up, each [rows, width]."""
    lib = library()
    assert lib is not None
    gate, up = rows_of(gate), rows_of(up)
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype)
    lib.fastpost_swiglu_forward(
        gate.dtype == torch.bfloat16,
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        rows,
        width,
        out.data_ptr(),
        simd_limit,
        _threads(gate),
    )
    return out


def swiglu_backward(
    grad: Tensor,  # [rows, width]
    gate: Tensor,
    up: Tensor,
    need_gate: bool,
    need_up: bool,
    simd_limit: int = -1,
) -> tuple[Tensor | None, Tensor | None]:
    """d gate and d up, [rows, width]; None where not needed."""
    lib = library()
    assert lib is not None
    grad, gate, up = rows_of(grad), rows_of(gate), rows_of(up)
    rows, width = gate.shape
    d_gate = torch.empty(rows, width, dtype=gate.dtype) if need_gate else None
    d_up = torch.empty(rows, width, dtype=gate.dtype) if need_up else None
    lib.fastpost_swiglu_backward(
        gate.dtype == torch.bfloat16,
        grad.data_ptr(),
        grad.stride(0),
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        rows,
        width,
        _pointer(d_gate),
        _pointer(d_up),
        simd_limit,
        _threads(gate),
    )
    return d_gate, d_up
