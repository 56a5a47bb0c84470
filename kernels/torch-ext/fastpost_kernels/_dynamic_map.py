"""The 8-bit dynamic maps of optimizer states: 256 levels between -1 and 1, or 0 and 1, a byte each.

A block of 256 neighbours in memory is divided by its largest magnitude (fp32, kept beside it) and
each quotient becomes the index of the nearest level. Levels lie in seven decades, 1e-7 to 1. Each
decade is cut into equal cells whose middles are the levels, twice as many in each as in the one
below: 1 to 64 cells of each sign in the signed map, 2 to 128 in the unsigned one; 0 and 1 complete
them. Small magnitudes keep a relative error, where equal steps over [-1, 1] would lose them: an
element at 1e-4 of its block's maximum is 0 in a linear map.

Let u be 1, 2, ... over the positive levels of the signed map, 2, 3, ... over those of the unsigned
one: cell j of a decade of n cells is u = n + j. So the bits of u are decade and cell, and kernels
compute levels instead of looking them up.

One exception to "nearest": a positive second moment never becomes 0. It would divide the first
moment by eps alone at the next step.

Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv:2110.02861), section
2; the levels are bitsandbytes', bit for bit, and so are the bytes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["BLOCK", "SIGNED_ZERO", "dequantize", "levels", "num_blocks", "quantize"]

BLOCK = 256
SIGNED_ZERO = 127  # index of 0 in the signed map; in the unsigned one it is 0
_DECADES = 7


def num_blocks(elements: int) -> int:
    return -(-elements // BLOCK)


@functools.cache
def levels(signed: bool) -> Tensor:
    """[256] float32 on the CPU, ascending."""
    positive = []
    for decade in range(_DECADES):
        cells = 2 ** (decade + (not signed))
        edges = torch.linspace(0.1, 1, cells + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - _DECADES + 1))
    zero, one = torch.zeros(1), torch.ones(1)
    negative = [-values for values in positive] if signed else []
    return torch.cat([*positive, *negative, zero, one]).sort().values


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Values of `codes` [n] uint8 with `absmax` [blocks], [n] in the dtype of `absmax`."""
    table = levels(signed).to(device=codes.device, dtype=absmax.dtype)
    return table[codes.long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes [n] uint8 and absmax [blocks] of `values` [n]; blocks of zeros have absmax 0."""
    size = values.numel()
    blocks = pad(values, (0, -size % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = torch.where(absmax[:, None] > 0, blocks / absmax[:, None], 0).flatten()[:size]
    table = levels(signed).to(device=values.device, dtype=values.dtype)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2)
    if not signed:
        codes = torch.where(values > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8), absmax
