"""FLOPs and workspace bytes of prefix_attention's two ops, for counters and planners.

FLOPs are those of the visible pairs, the useful work: a pair costs two products in the forward (q·k
and p·v) and five in the backward (q·k again, dO·v, and dQ, dK, dV). They depend on the contents of
`segments`. Fake segments hold none; then all tokens count as one causal row, the most there can be.

Workspace is an upper bound that reads no data: as if every token had an ancestor. That of backend
"flash" holds in its backward what flash-attn allocates for sums of dQ that need no atomics. That of
"triton", whose kernels sum in registers, is of the rows' statistics and of operands it copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from . import _prefix_regions as regions
from ._cost import _WORKSPACE
from ._prefix_segments import num_visible, schedule_of

__all__ = [
    "SLAB_ELEMENTS",
    "backward_flops",
    "backward_workspace",
    "forward_flops",
    "forward_workspace",
    "register_costs",
]

SLAB_ELEMENTS = 1 << 24  # of dO and O, multiplied at once in the backward of backend "triton"
_TABLE_BYTES = 16  # a token, in tables of backend "triton": its position, its share of a block
_MAX_MULTIPROCESSORS = 160  # of one GPU; a B200 has 148


def register_costs(
    op: torch.library.CustomOpDef, flops: Callable[..., int], workspace: Callable[..., int]
) -> None:
    """Registers both formulas. The general registration shows formulas shapes; these need data."""
    packet = op._opoverload.overloadpacket
    register_flop_formula(packet, get_raw=True)(flops)
    _WORKSPACE[packet] = workspace


def forward_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
    out_val: tuple[Tensor, Tensor] | None = None,
) -> int:
    """2·Hq·(D + Dv) per visible pair."""
    pairs = _num_pairs(segments, query.shape[1], window)
    return 2 * query.shape[0] * pairs * (query.shape[2] + value.shape[2])


def backward_flops(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
    out_val: tuple[Tensor, ...] | None = None,
) -> int:
    """2·Hq·(3D + 2Dv) per visible pair."""
    pairs = _num_pairs(segments, query.shape[1], window)
    return 2 * query.shape[0] * pairs * (3 * query.shape[2] + 2 * value.shape[2])


def forward_workspace(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> int:
    """Bytes of merged and partial outputs, row statistics, operands and scores."""
    if backend == "triton":
        return _triton_operands(query, key, value)
    rows, head = query.shape[0] * query.shape[1], _head_size(query, value)
    elements = 3 * rows * head + 8 * rows + _operands_and_scores(query, key, head)
    return elements * regions.accumulate_dtype(query.dtype).itemsize


def backward_workspace(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> int:
    """Bytes of summed and partial gradients, dO and O in fp32, operands and scores."""
    if backend == "triton":
        copied = _triton_operands(grad_out, query, key, value, lse)
        return copied + 4 * (lse.numel() + 3 * _slab(out))
    rows, head = query.shape[0] * query.shape[1], _head_size(query, value)
    gradients = 2 * (rows + 2 * key.shape[0] * key.shape[1]) * head
    elements = gradients + 2 * rows * head + 4 * rows + _operands_and_scores(query, key, head)
    if backend == "flash":
        elements += _split_sums(query, head, segments.shape[0])
    return elements * regions.accumulate_dtype(query.dtype).itemsize


def _triton_operands(*tensors: Tensor) -> int:
    """Bytes of copies of operands that need one, and of the tables of blocks and positions."""
    copied = sum(x.numel() * x.itemsize for x in tensors if x.stride(-1) != 1)
    return copied + _TABLE_BYTES * tensors[0].shape[1]


def _slab(out: Tensor) -> int:
    """Elements of dO and O that backend "triton" has in fp32 at once."""
    heads, tokens, size = out.shape
    return heads * size * min(tokens, max(1, SLAB_ELEMENTS // (heads * size)))


def _num_pairs(segments: Tensor, num_tokens: int, window: int | None) -> int:
    if isinstance(segments, FakeTensor):
        return num_visible(0, num_tokens, window)
    return schedule_of(segments, num_tokens).num_pairs(window)


def _head_size(query: Tensor, value: Tensor) -> int:
    """The larger head size, as backends that pad heads have it."""
    return -(-max(query.shape[2], value.shape[2]) // 8) * 8


def _split_sums(query: Tensor, head: int, num_segments: int) -> int:
    """Elements of ⌈SMs / (B·Hq)⌉ copies of dQ, each sequence of B ending with 128 more rows.

    At most 2 sequences of a call are of one segment; the bound holds for every B from 1 to that.
    """
    num_heads, num_tokens, _ = query.shape
    head = -(-head // 64) * 64
    padding = 128 * (_MAX_MULTIPROCESSORS + num_heads * 2 * num_segments)
    return ((_MAX_MULTIPROCESSORS + num_heads) * num_tokens + padding) * head


def _operands_and_scores(query: Tensor, key: Tensor, head: int) -> int:
    """Elements of query, key and value at one head size, and of the scores alive together."""
    operands = (query.shape[0] + 2 * key.shape[0]) * query.shape[1] * head
    scores = max(regions.MAX_SCORES, query.shape[0] * query.shape[1])
    return operands + 6 * scores
