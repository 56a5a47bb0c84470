"""Scales of 8-bit optimizer states, cut for another number of shards.

`AdamW8bit` keeps a scale for 256 elements of a process's shard: `absmax` is [shards, blocks of the
largest shard], or [blocks] of a parameter that is not sharded. FSDP2 cuts parameters by rows, into
shards of as many rows as `torch.chunk` gives. Where shards begin at a multiple of 256 elements the
blocks are the same however the parameter is cut, and only their places change: every weight whose
rows have a multiple of 256 elements. Otherwise blocks would have to be rounded again, which is
refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

__all__ = ["BLOCK", "SCALES", "SMALL", "fill_scales", "has_same_blocks"]

SCALES = ("absmax", "absmax_sq")
BLOCK = 256  # elements that share a scale
SMALL = 4096  # elements below which states stay float32, without scales


def has_same_blocks(shape: Sequence[int], shards: int) -> bool:
    """Whether a parameter cut into `shards` has the blocks of the whole one."""
    bounds = _bounds(shape, shards)
    return all(start % BLOCK == 0 for start, _ in bounds)


def fill_scales(scales: Tensor, saved: Tensor, parameter: Tensor) -> None:
    """Put saved scales into those of this process.

    Args:
        scales: float32 [shards, blocks] sharded by rows, or [blocks].
        saved: whole, of the same parameter, cut in any way.
        parameter: theirs.

    Raises:
        ValueError: shards begin within a block; the parameter is not cut by rows.
    """
    shape = tuple(parameter.shape)
    before = saved.shape[0] if saved.dim() == 2 else 1
    now, index = _shard_of(parameter)
    if not (has_same_blocks(shape, before) and has_same_blocks(shape, now)):
        raise ValueError(
            f"8-bit states of a parameter {list(shape)} have other blocks of {BLOCK} elements in "
            f"{before} shards than in {now}"
        )
    rows = saved.reshape(before, -1)
    pieces = [
        row[: math.ceil((end - start) / BLOCK)]
        for row, (start, end) in zip(rows, _bounds(shape, before), strict=False)
    ]
    local = scales.to_local() if isinstance(scales, DTensor) else scales
    local.zero_()
    bounds = _bounds(shape, now)
    if index < len(bounds):
        start, end = (math.ceil(bound / BLOCK) for bound in bounds[index])
        local.view(-1)[: end - start].copy_(torch.cat(pieces)[start:end])


def _bounds(shape: Sequence[int], shards: int) -> list[tuple[int, int]]:
    """First and past the last element of each shard that has any."""
    rows, width = shape[0], math.prod(shape[1:])
    a_shard = -(-rows // shards)
    return [
        (start * width, min(start + a_shard, rows) * width) for start in range(0, rows, a_shard)
    ]


def _shard_of(parameter: Tensor) -> tuple[int, int]:
    """In how many shards a parameter is, and which one this process has."""
    if not isinstance(parameter, DTensor):
        return 1, 0
    cut = [i for i, p in enumerate(parameter.placements) if not p.is_replicate()]
    if not cut:
        return 1, 0
    if len(cut) > 1 or parameter.placements[cut[0]] != Shard(0):
        raise ValueError(f"a parameter placed as {parameter.placements} is not cut by rows")
    mesh = parameter.device_mesh
    return mesh.size(cut[0]), mesh.get_local_rank(cut[0])
