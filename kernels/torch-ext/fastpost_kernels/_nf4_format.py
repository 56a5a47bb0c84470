"""The bytes of a 4-bit NormalFloat weight, as bitsandbytes writes them.

A weight [N, K] is cut, row-major, into blocks of `block_size`. Each block keeps its largest
absolute value, absmax; each element the nearest of 16 levels to its share of it, two to a byte, the
first in the high half. With double quantisation absmax itself is kept as bytes:

    absmax[i] = nested_code[byte[i]] * nested_absmax[i // 256] + offset

where offset is the mean and nested_code the 256 levels of an 8-bit dynamic exponent. Both ways are
bit-equal to bitsandbytes on CPUs. Its CUDA kernel picks the level of about one absmax in 700, next
to the border of two, differently from its CPU code; either reads the other's bytes.

Sources: Dettmers et al., "QLoRA" (arXiv:2305.14314), section 3 and appendix E; the dynamic exponent
is of Dettmers et al., "8-bit optimizers" (arXiv:2110.02861), section 2.1.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BLOCK_SIZES",
    "NESTED_BLOCK",
    "NF4_LEVELS",
    "Nf4Weight",
    "absmax_of",
    "dequantize_plain",
    "nested_levels",
    "quantize_plain",
]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
_PIECE = 1 << 22  # elements, whole blocks of any size
# Quantiles of a standard normal, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Nf4Weight(NamedTuple):
    """A quantised weight [N, K]."""

    packed: Tensor  # N K / 2 bytes, uint8 or viewed as bfloat16, of any shape
    absmax: Tensor  # [blocks] float32, or uint8 with double quantisation
    shape: tuple[int, int]
    block_size: int = 64
    nested_absmax: Tensor | None = None  # [ceil(blocks / 256)] float32
    nested_code: Tensor | None = None  # [256] float32
    offset: Tensor | None = None  # [] float32


@functools.cache
def nested_levels() -> Tensor:
    """The 256 sorted levels of the dynamic exponent: 2^e equal steps of [0.1, 1] times 10^(e - 6)
    for e from 0 to 6, of both signs, with 0 and 1."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1, -1):
            levels += (sign * 10 ** (exponent - 6) * middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32)


@functools.cache
def _nested_table() -> Tensor:
    """The nearest level of each of 65,536 points of [-1, 1], [65536] uint8."""
    levels = nested_levels().double()
    points = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1
    return torch.bucketize(points, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _quantize_piece(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Bytes and absmax of elements in float32."""
    levels = torch.tensor(NF4_LEVELS, device=flat.device)
    blocks = _padded(flat, block_size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    if len(flat) % block_size:
        # bitsandbytes keeps a positive absmax for a last, short block, and divides by it
        absmax[-1] = absmax[-1].clamp(min=1e-38)
        scaled[-1] = (blocks[-1] / absmax[-1]).clamp(-1, 1)
    scaled = _padded(scaled.reshape(-1)[: len(flat)], 2).reshape(-1)
    index = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return (index[::2] << 4) | index[1::2], absmax


def quantize_plain(weight: Tensor, block_size: int, double_quant: bool) -> Nf4Weight:
    """`weight` [N, K] in torch operations, piece by piece: they take some 20 bytes an element."""
    flat = weight.reshape(-1)
    packed = flat.new_empty(-(-len(flat) // 2), dtype=torch.uint8)
    absmax = flat.new_empty(-(-len(flat) // block_size), dtype=torch.float32)
    for start in range(0, len(flat), _PIECE):
        part, scales = _quantize_piece(flat[start : start + _PIECE].float(), block_size)
        packed[start // 2 : start // 2 + len(part)] = part
        absmax[start // block_size : start // block_size + len(scales)] = scales
    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return Nf4Weight(packed, absmax, shape, block_size)
    offset = absmax.mean()
    centred = _padded(absmax - offset, NESTED_BLOCK)
    nested = centred.abs().amax(1)
    point = ((centred * (1.0 / nested)[:, None] + 1) * 32767.5 + 0.5).nan_to_num(0.0)
    table = _nested_table().to(weight.device)
    codes = table[point.long().clamp(0, 65535)].reshape(-1)[: len(absmax)]
    code = nested_levels().to(weight.device)
    return Nf4Weight(packed, codes, shape, block_size, nested, code, offset)


def absmax_of(weight: Nf4Weight) -> Tensor:
    """absmax of every block, [blocks] float32."""
    if weight.nested_absmax is None:
        return weight.absmax
    assert weight.nested_code is not None and weight.offset is not None
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(weight.absmax)]
    return weight.nested_code[weight.absmax.long()] * nested + weight.offset


def dequantize_plain(
    packed: Tensor,  # bytes, flat
    absmax: Tensor,  # [blocks] float32
    shape: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """[N, K] in torch operations: level times absmax in float32, rounded once."""
    levels = torch.tensor(NF4_LEVELS, device=packed.device)
    index = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: math.prod(shape)]
    values = _padded(levels[index.long()], block_size) * absmax[:, None]
    return values.reshape(-1)[: math.prod(shape)].view(shape).to(dtype)


def _padded(flat: Tensor, size: int) -> Tensor:
    """[ceil(n / size), size] with zeros behind."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
