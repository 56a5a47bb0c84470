"""Unpacks rows or columns of a 4-bit NormalFloat weight: in Triton, C++ or torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._csrc import advise_huge_pages, library, num_threads
from ._device import HAS_TRITON
from ._nf4_format import NF4_LEVELS, dequantize_plain

if HAS_TRITON:
    from . import _nf4_triton as passes_triton

__all__ = ["WeightTiles", "unpack"]

# Bytes of one unpacked tile: what a GEMM finds again in the last cache.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
_LEVELS = torch.tensor(NF4_LEVELS)


def unpack(
    packed: Tensor,  # bytes, flat uint8
    absmax: Tensor,  # [blocks] float32
    shape: tuple[int, int],
    block_size: int,
    part: tuple[slice, slice],
    out: Tensor,
    backend: str,
    simd_limit: int = -1,
) -> Tensor:
    """`out` = weight[part]: all columns of some rows, or some columns (even ones) of all rows."""
    inputs = shape[1]
    rows, cols = part
    first = rows.start * inputs + cols.start
    if cols.stop - cols.start == inputs:  # one run: rows are adjacent
        run, stride = out.view(1, -1), 0
    else:
        run, stride = out, inputs
    begins_blocks = first % block_size == 0 and stride % block_size == 0
    if backend == "triton" and begins_blocks and run.shape[1] % 2 == 0:
        passes_triton.unpack(packed, absmax, block_size, first, stride, run)
    elif backend == "cpp" and first % 2 == 0 and stride % 2 == 0:
        lib = library()
        assert lib is not None
        lib.fastpost_nf4_unpack(
            out.dtype == torch.bfloat16,
            packed.data_ptr(),
            absmax.data_ptr(),
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
        whole = dequantize_plain(packed, absmax, shape, block_size, out.dtype)
        out.copy_(whole[part])
    return out


class WeightTiles:
    """A quantised weight, unpacked tile by tile into one reused buffer."""

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        shape: tuple[int, int],
        block_size: int,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        self.arguments = (packed.reshape(-1).view(torch.uint8), absmax.contiguous(), shape)
        self.shape, self.block_size, self.dtype, self.backend = shape, block_size, dtype, backend
        self.elements = tile_elements(shape, block_size, dtype, packed.device.type)
        self.buffer: Tensor | None = None

    def by_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the outputs with their weights [n, K]."""
        outputs, inputs = self.shape
        step = max(1, self.elements // max(1, inputs))
        for start in range(0, outputs, step):
            part = slice(start, min(start + step, outputs))
            yield part, self._tile((part, slice(0, inputs)))

    def by_columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the inputs with their weights [N, k]."""
        outputs, inputs = self.shape
        step = max(self.block_size, self.elements // max(1, outputs))
        step = step // self.block_size * self.block_size
        for start in range(0, inputs, step):
            part = slice(start, min(start + step, inputs))
            yield part, self._tile((slice(0, outputs), part))

    def _tile(self, part: tuple[slice, slice]) -> Tensor:
        rows, cols = (s.stop - s.start for s in part)
        if self.buffer is None or self.buffer.numel() < rows * cols:
            device = self.arguments[0].device
            fresh = torch.empty(rows * cols, dtype=self.dtype, device=device)
            self.buffer = advise_huge_pages(fresh)
        out = self.buffer[: rows * cols].view(rows, cols)
        return unpack(*self.arguments, self.block_size, part, out, self.backend)


def tile_elements(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype, device_type: str
) -> int:
    """Elements of a tile; all of them where rows do not begin and end with whole blocks."""
    whole = shape[0] * shape[1]
    if shape[1] % block_size:
        return whole
    return min(whole, TILE_BYTES["cpu" if device_type == "cpu" else "cuda"] // dtype.itemsize)
