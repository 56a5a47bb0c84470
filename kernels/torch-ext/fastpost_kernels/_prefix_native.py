"""A whole layer's prefix attention in one C++ call, for forests of short paths on the CPU.

PyTorch's blockwise kernel takes one region a call. With tens of segments of tens of tokens, packing
its operands and placing its results cost more than the products: 8 pairs of short answers (1,352
tokens, 9 heads of 64, bf16, 2 threads) take 7.7 + 18.6 ms a layer that way and 3.6 + 9.5 ms here.
On CPUs with matrix tiles (AMX) bf16 is 4 to 6 times as fast again, one thread on either side, see
csrc/prefix_attention_amx.cpp. Longer paths go to PyTorch's kernel: beyond `_MAX_PATH` it is faster
in 16 bits than the kernel without tiles. The one with tiles is faster than PyTorch's at 600 to
1,600 tokens too, as far as it was measured; at `_MAX_PATH_ON_TILES` one thread's scores take 0.5 MB
of a 2 MB cache.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ._csrc import library, num_threads
from ._prefix_segments import PrefixSchedule

__all__ = ["can_run_native", "native_backward", "native_forward"]

_MAX_PATH = 512
_MAX_PATH_ON_TILES = 4096
_AMX = 3  # as csrc/simd.h numbers it
# Highest instruction set to take, see csrc/simd.h; -1 for the best. Tests set it.
_SIMD_LIMIT = -1


def can_run_native(
    query: Tensor, schedule: PrefixSchedule, window: int | None, softcap: float | None
) -> bool:
    """Whether the C++ kernel exists, is exact for this call, and is the faster one."""
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not schedule.inherited or softcap is not None:
        return False
    longest = max(base + length for base, length in schedule.spans)
    is_windowed = window is not None and longest > window
    if is_windowed or library() is None:
        return False
    return longest <= (_MAX_PATH_ON_TILES if _has_tiles(query.dtype) else _MAX_PATH)


def _has_tiles(dtype: torch.dtype) -> bool:
    """Whether the C++ kernel multiplies this dtype on the CPU's matrix tiles."""
    native = library()
    assert native is not None
    is_allowed = _SIMD_LIMIT < 0 or _SIMD_LIMIT >= _AMX
    return dtype == torch.bfloat16 and is_allowed and native.fastpost_simd() == _AMX


def native_forward(
    query: Tensor, key: Tensor, value: Tensor, schedule: PrefixSchedule, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns out [Hq, N, Dv], tokens outermost, and lse [Hq, N] in fp32, without sinks."""
    num_heads, num_tokens, _ = query.shape
    out = query.new_empty(num_tokens, num_heads, value.shape[-1]).transpose(0, 1)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32)
    _call(False, [*_readable(query, key, value), out], lse, schedule, scale)
    return out, lse


def native_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: PrefixSchedule,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dQ, dK, dV, tokens outermost; the same bits for any number of threads."""
    grads = [
        x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1) for x in (query, key, value)
    ]
    tensors = [*_readable(query, key, value, out, grad_out), *grads]
    _call(True, tensors, lse.contiguous(), schedule, scale)
    return grads[0], grads[1], grads[2]


def _readable(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _call(
    is_backward: bool, tensors: list[Tensor], lse: Tensor, schedule: PrefixSchedule, scale: float
) -> None:
    native = library()
    assert native is not None
    query, key = tensors[0], tensors[1]
    layout = [n for x in tensors for n in (x.stride(0), x.stride(1), x.shape[2])]
    shape = (query.shape[0], key.shape[0], query.shape[1], len(schedule.segments))
    segments = [n for segment in schedule.segments for n in segment]
    native.fastpost_prefix_attention(
        is_backward,
        query.dtype == torch.bfloat16,
        (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors)),
        (ctypes.c_int64 * len(layout))(*layout),
        lse.data_ptr(),
        (ctypes.c_int64 * 4)(*shape),
        (ctypes.c_int64 * len(segments))(*segments),
        scale,
        _SIMD_LIMIT,
        num_threads(),
    )
