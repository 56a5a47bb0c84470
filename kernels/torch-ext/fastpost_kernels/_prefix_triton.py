"""prefix_attention on a GPU: tables from the segments, tile sizes, launches.

Each query block walks its ancestors' keys and its own segment's, as a list of ranges; ranges that
touch are one (a first child follows its parent), so most blocks walk one or two. Each key block is
seen by one contiguous range of rows: the rest of its segment and all descendants. Each gradient is
therefore summed by one program in a fixed order: no atomics, the same bits on every run.

The tables depend on `segments` alone. They are cached per device, so that the layers of a model and
its backward share one copy.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from ._choices import attention_shape, choose
from ._device import AMD, capability
from ._prefix_costs import SLAB_ELEMENTS
from ._prefix_kernels import (
    prefix_attention_bwd_key_kernel,
    prefix_attention_bwd_query_kernel,
    prefix_attention_fwd_kernel,
)
from ._prefix_regions import Scoring
from ._prefix_segments import PrefixSchedule

__all__ = ["backward_triton", "choose_tiles", "forward_triton"]

# Consumer GPUs: 99 KB of shared memory per block instead of 163 or 227.
_SMALL_SHARED_MEMORY = (86, 89, 120, 121)


def choose_tiles(
    head_size: int, itemsize: int, capability: int
) -> dict[str, tuple[int, int, int, int]]:
    """(BLOCK_M, BLOCK_N, warps, stages) per kernel, for the larger head size of a call.

    Not one of them spills when compiled for `capability` 80, 86, 89, 90, 100, 120 or AMD (gfx942),
    with or without softcap and window, which tests assert; of unequal sizes, as 192 and 128, with
    both, the forward spills 16 bytes on 86 and 89. None was timed on a GPU.
    """
    if itemsize > 2:  # fp32 products do not use tensor cores: for checks rather than speed
        return dict.fromkeys(("forward", "grad_query", "grad_key"), (32, 32, 4, 1))
    if capability == AMD:
        # 8 waves of 64 threads get 256 registers each, which spills; 4 get 512. 64 KB of memory.
        rows = 64 if head_size > 128 else 128
        return dict.fromkeys(("forward", "grad_query"), (rows, 32, 4, 2)) | {
            "grad_key": (32, 64, 4, 2)
        }
    if head_size > 128 and capability in _SMALL_SHARED_MEMORY:
        return {
            "forward": (64, 32, 8, 2),
            "grad_query": (64, 32, 8, 1),
            "grad_key": (32, 64, 8, 1),
        }
    if head_size > 128:
        # On sm_100 the sums move between tensor memory and registers at every key range.
        stages = 1 if capability >= 100 else 2
        return {
            "forward": (64, 32, 8, 2),
            "grad_query": (64, 32, 8, stages),
            "grad_key": (32, 64, 8, 2),
        }
    if head_size > 64:
        # Head sizes between powers of two mask their columns, which takes registers.
        keys = 64 if head_size == 128 else 32
        is_small = capability in _SMALL_SHARED_MEMORY
        return {
            "forward": (128, keys, 8, 2),
            "grad_query": (64, 32, 4, 2) if is_small and head_size < 128 else (64, 64, 8, 2),
            "grad_key": (64, 64, 8, 2) if is_small else (32, 64, 4, 2),
        }
    return dict.fromkeys(("forward", "grad_query"), (128, 64, 8, 2)) | {"grad_key": (64, 128, 8, 2)}


def _measured_tiles(head_size: int, query: Tensor) -> dict[str, tuple[int, ...]]:
    """`choose_tiles`, but for kernels of which another tile was measured faster on this GPU."""
    tiles: dict[str, tuple[int, ...]] = {}
    shape = attention_shape(head_size, query.dtype)
    chosen = choose_tiles(head_size, query.itemsize, capability(query.device))
    for kernel, tile in chosen.items():
        option = choose(f"prefix_{kernel}", query.device, shape)
        tiles[kernel] = tile if option == "default" else tuple(map(int, option.split("x")))
    return tiles


@lru_cache(maxsize=16)
def _query_table(
    schedule: PrefixSchedule, block_m: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Query blocks and the key ranges they walk, the longest walk first."""
    ranges: list[tuple[int, int]] = []
    blocks: list[tuple[int, int, int, int]] = []
    work: list[int] = []
    path: list[tuple[int, int, int]] = []
    for start, end, subtree_end in schedule.segments:
        while path and path[-1][2] <= start:
            path.pop()
        path.append((start, end, subtree_end))
        first_range = len(ranges)
        for key_start, key_end, _ in path:
            if len(ranges) > first_range and ranges[-1][1] == key_start:
                ranges[-1] = (ranges[-1][0], key_end)
            else:
                ranges.append((key_start, key_end))
        above = sum(stop - first for first, stop, _ in path[:-1])
        for row in range(start, end, block_m):
            blocks.append((row, min(row + block_m, end), first_range, len(ranges)))
            work.append(above + row - start)
    order = sorted(range(len(blocks)), key=lambda i: -work[i])
    table = torch.tensor([blocks[i] for i in order], dtype=torch.int32)
    return table.to(device), torch.tensor(ranges, dtype=torch.int32).to(device)


@lru_cache(maxsize=16)
def _key_table(schedule: PrefixSchedule, block_n: int, device: torch.device) -> Tensor:
    """Key blocks and the end of the rows that see them, the most rows first."""
    blocks = [
        (key, min(key + block_n, end), subtree_end)
        for start, end, subtree_end in schedule.segments
        for key in range(start, end, block_n)
    ]
    blocks.sort(key=lambda block: block[0] - block[2])
    return torch.tensor(blocks, dtype=torch.int32).to(device)


@lru_cache(maxsize=16)
def _device_positions(schedule: PrefixSchedule, device: torch.device) -> Tensor:
    return schedule.positions.to(device, torch.int32)


def _options(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, tile: tuple[int, ...]
) -> dict[str, int | bool]:
    """What all three kernels are compiled for."""
    block_m, block_n, num_warps, num_stages = tile
    return {
        "GROUPS": query.shape[0] // key.shape[0],
        "HEAD_SIZE": query.shape[2],
        "VALUE_SIZE": value.shape[2],
        "HAS_SOFTCAP": scoring.softcap is not None,
        "HAS_WINDOW": scoring.window is not None,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(query.shape[2])),
        "BLOCK_DV": max(16, triton.next_power_of_2(value.shape[2])),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _scalars(scoring: Scoring) -> tuple[float, float, int]:
    return scoring.scale, scoring.softcap or 1.0, scoring.window or 0


def _contiguous_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _empty_like(x: Tensor, size: int) -> Tensor:
    """[H, N, size] with tokens outermost in memory."""
    return x.new_empty(x.shape[1], x.shape[0], size).transpose(0, 1)


def _row_sums(grad_out: Tensor, out: Tensor) -> Tensor:
    """Σ_d dO·O in fp32, [Hq, N], in slabs of tokens: whole fp32 copies would be the largest tensors
    of a long backward."""
    heads, tokens, size = out.shape
    delta = out.new_empty((heads, tokens), dtype=torch.float32)
    slab = max(1, SLAB_ELEMENTS // (heads * size))
    for start in range(0, tokens, slab):
        rows = slice(start, start + slab)
        delta[:, rows] = (grad_out[:, rows].float() * out[:, rows].float()).sum(-1)
    return delta


def forward_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    schedule: PrefixSchedule,
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Returns (out [Hq, N, Dv], lse [Hq, N] fp32, sinks included)."""
    query, key, value = _contiguous_rows(query, key, value)
    out = _empty_like(query, value.shape[2])
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    if query.shape[1] == 0:
        return out, lse
    widest = max(query.shape[2], value.shape[2])
    tile = _measured_tiles(widest, query)["forward"]
    blocks, ranges = _query_table(schedule, tile[0], query.device)
    positions = _device_positions(schedule, query.device)
    strides = [x.stride(i) for x in (query, key, value, out) for i in (0, 1)]
    prefix_attention_fwd_kernel[(len(blocks), query.shape[0])](
        query, key, value, sinks, out, lse, blocks, ranges, positions,
        *strides, lse.stride(0), *_scalars(scoring),
        HAS_SINKS=sinks is not None, **_options(query, key, value, scoring, tile),
    )  # fmt: skip
    return out, lse


def backward_triton(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: PrefixSchedule,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dQ, dK, dV)."""
    query, key, value, grad_out = _contiguous_rows(query, key, value, grad_out)
    grads = [_empty_like(x, x.shape[2]) for x in (query, key, value)]
    if query.shape[1] == 0:
        return grads[0], grads[1], grads[2]
    delta = _row_sums(grad_out, out)
    lse = lse.contiguous()
    positions = _device_positions(schedule, query.device)
    inputs = (query, key, value, grad_out, lse, delta)
    strides = [x.stride(i) for x in (query, key, value, grad_out) for i in (0, 1)]
    grad_strides = [[x.stride(0), x.stride(1)] for x in grads]
    widest = max(query.shape[2], value.shape[2])
    tiles = _measured_tiles(widest, query)
    passes = [(True, True)] if widest <= 128 else [(True, False), (False, True)]

    tile = tiles["grad_query"]
    blocks, ranges = _query_table(schedule, tile[0], query.device)
    prefix_attention_bwd_query_kernel[(len(blocks), query.shape[0])](
        *inputs, grads[0], blocks, ranges, positions,
        *strides, *grad_strides[0], lse.stride(0), *_scalars(scoring),
        **_options(query, key, value, scoring, tile),
    )  # fmt: skip

    tile = tiles["grad_key"]
    blocks = _key_table(schedule, tile[1], query.device)
    # Both sums of a wide head exceed the registers: then one pass each, five products for four.
    for needs_key, needs_value in passes:
        prefix_attention_bwd_key_kernel[(len(blocks), key.shape[0])](
            *inputs, grads[1], grads[2], blocks, positions,
            *strides, *grad_strides[1], *grad_strides[2], lse.stride(0), *_scalars(scoring),
            NEEDS_KEY=needs_key, NEEDS_VALUE=needs_value,
            **_options(query, key, value, scoring, tile),
        )  # fmt: skip
    return grads[0], grads[1], grads[2]
