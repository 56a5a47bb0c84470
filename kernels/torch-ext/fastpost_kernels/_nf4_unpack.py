"""Unpacks rows or columns of a 4-bit NormalFloat weight: in Triton, C++ or torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ._csrc import library, num_threads
from ._device import HAS_TRITON
from ._kept_buffer import kept_buffer
from ._nf4_format import NF4_LEVELS, Nf4Weight, absmax_of, dequantize_plain

if HAS_TRITON:
    from . import _nf4_triton as passes_triton

__all__ = ["WeightTiles", "as_it_lies", "tile_elements", "unpack"]

# Bytes of one unpacked tile: what a GEMM finds again in the last cache.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
_LEVELS = torch.tensor(NF4_LEVELS)


def unpack(
    weight: Nf4Weight,
    part: tuple[slice, slice],
    out: Tensor,
    backend: str,
    simd_limit: int = -1,
) -> Tensor:
    """`out` = weight[part]: all columns of some rows, or some columns (even ones) of all rows."""
    (_, inputs), block_size = weight.shape, weight.block_size
    rows, cols = part
    first = rows.start * inputs + cols.start
    if cols.stop - cols.start == inputs:  # one run: rows are adjacent
        run, stride = out.view(1, -1), 0
    else:
        run, stride = out, inputs
    begins_blocks = first % block_size == 0 and stride % block_size == 0
    if backend == "triton" and begins_blocks and run.shape[1] % 2 == 0:
        packed = weight.packed.reshape(-1).view(torch.uint8)
        passes_triton.unpack(packed, absmax_of(weight), block_size, first, stride, run)
    elif backend == "cpp" and first % 2 == 0 and stride % 2 == 0:
        lib = library()
        assert lib is not None
        lib.fastpost_nf4_unpack(
            out.dtype == torch.bfloat16,
            weight.packed.data_ptr(),
            *_scales(weight),
            _LEVELS.data_ptr(),
            block_size,
            first,
            stride,
            run.shape[0],
            run.shape[1],
            out.data_ptr(),
            run.stride(0),
            simd_limit,
            num_threads(),
        )
    else:
        packed = weight.packed.reshape(-1).view(torch.uint8)
        whole = dequantize_plain(packed, absmax_of(weight), weight.shape, block_size, out.dtype)
        out.copy_(whole[part])
    return out


def as_it_lies(weight: Nf4Weight) -> Nf4Weight:
    """The weight as C++ reads it: contiguous, what decodes absmax in float32."""
    nested = (weight.nested_absmax, weight.nested_code, weight.offset)
    wide = [t if t is None or _lies(t) else t.to(torch.float32).contiguous() for t in nested]
    packed, absmax = weight.packed.contiguous(), weight.absmax.contiguous()
    return Nf4Weight(packed, absmax, weight.shape, weight.block_size, *wide)


def _lies(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


def _scales(weight: Nf4Weight) -> tuple[int | None, ...]:
    """Pointers to absmax, or to its bytes and what they stand for, which C++ decodes by block."""
    if weight.nested_absmax is None:
        return weight.absmax.data_ptr(), None, None, None, None
    assert weight.nested_code is not None and weight.offset is not None
    nested, code, offset = weight.nested_absmax, weight.nested_code, weight.offset
    return None, *(part.data_ptr() for part in (weight.absmax, nested, code, offset))


class WeightTiles:
    """A quantised weight, unpacked tile by tile into one buffer, on CPUs one that is kept
    between calls: page faults of a fresh one would cost as much as unpacking."""

    def __init__(self, weight: Nf4Weight, dtype: torch.dtype, backend: str) -> None:
        if backend != "cpp":  # once, not by tile
            weight = weight._replace(absmax=absmax_of(weight), nested_absmax=None)
        self.weight = as_it_lies(weight)
        self.shape, self.block_size = weight.shape, weight.block_size
        self.dtype, self.backend = dtype, backend
        device = weight.packed.device.type
        self.elements = tile_elements(weight.shape, weight.block_size, dtype, device)

    def by_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the outputs with their weights [n, K]."""
        outputs, inputs = self.shape
        step = min(outputs, max(1, self.elements // max(1, inputs)))
        with self._buffer(step * inputs) as buffer:
            for start in range(0, outputs, step or 1):
                part = slice(start, min(start + step, outputs))
                yield part, self._tile((part, slice(0, inputs)), buffer)

    def by_columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the inputs with their weights [N, k]."""
        outputs, inputs = self.shape
        step = max(self.block_size, self.elements // max(1, outputs))
        step = min(inputs, step // self.block_size * self.block_size)
        with self._buffer(outputs * step) as buffer:
            for start in range(0, inputs, step or 1):
                part = slice(start, min(start + step, inputs))
                yield part, self._tile((slice(0, outputs), part), buffer)

    def _buffer(self, elements: int) -> AbstractContextManager[Tensor]:
        return kept_buffer(elements, self.dtype, self.weight.packed.device)

    def _tile(self, part: tuple[slice, slice], buffer: Tensor) -> Tensor:
        rows, cols = (s.stop - s.start for s in part)
        out = buffer[: rows * cols].view(rows, cols)
        return unpack(self.weight, part, out, self.backend)


def tile_elements(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype, device_type: str
) -> int:
    """Elements of a tile; all of them where rows do not begin and end with whole blocks."""
    whole = shape[0] * shape[1]
    if shape[1] % block_size:
        return whole
    return min(whole, TILE_BYTES["cpu" if device_type == "cpu" else "cuda"] // dtype.itemsize)
