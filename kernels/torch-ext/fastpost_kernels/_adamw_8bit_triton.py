# mypy: disable-error-code="no-untyped-def"
# (arguments of jit functions are pointers and constexprs, which have no Python types)
"""`adamw_8bit_` on GPUs: one launch over any number of tensors, one pass over memory.

A program takes one piece: it reads addresses and sizes of its tensor, then 2048 elements and their
states once, and writes them back. Blocks lie along rows of the tile, so absmax is a reduction
inside a warp. Levels of the 8-bit maps are computed from the bits of their index and found again by
arithmetic (`_dynamic_map.py`): a table would be scattered loads, a search eight of them. With
stochastic rounding that makes about 190 instructions for 10 bytes moved: not measured, but an H100
may well be bound by them and not by its memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._adamw_8bit_tables import PIECE_BLOCKS, Lists, Rule, build_tables, owner_of_pieces
from ._dynamic_map import BLOCK
from ._philox import ROUNDS

__all__: list[str] = []

NUM_WARPS = 4
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def _level(code, SIGNED: tl.constexpr):
    """Of the sorted map, float32. With u = 2^e + j: cell j of a decade, e its number."""
    index = code.to(tl.int32)
    u = tl.abs(index - 127) if SIGNED else index + 1
    bits = u.to(tl.float32).to(tl.int32, bitcast=True)
    e = (bits >> 23) - 127
    # (j + 1/2) / 2^e
    middle = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    middle += ((126 - e) << 23).to(tl.float32, bitcast=True)
    power = tl.where((e & 4) != 0, 1.0, 1e-4) * tl.where((e & 2) != 0, 1.0, 1e-2)
    power *= tl.where((e & 1) != 0, 1.0, 1e-1)  # 10^(e - 7)
    if SIGNED:
        value = tl.where(u == 128, 1.0, power * (1.0 + 9.0 * middle))
        return tl.where(u == 0, 0.0, tl.where(index < 127, -value, value))
    value = tl.where(u == 256, 1.0, power * (0.1 + 0.9 * middle))
    return tl.where(u == 1, 0.0, value)


@triton.jit
def _code(x, SIGNED: tl.constexpr):
    """Index of the level nearest to x, of magnitude at most 1; int32."""
    LOWEST: tl.constexpr = 0.1944444444 if SIGNED else 0.1388888889
    magnitude = tl.abs(x)
    y = magnitude
    e = tl.full(x.shape, 6, tl.int32)
    small = y < 1e-4
    y, e = tl.where(small, y * 1e4, y), tl.where(small, e - 4, e)
    small = y < 1e-2
    y, e = tl.where(small, y * 1e2, y), tl.where(small, e - 2, e)
    small = y < 1e-1
    y, e = tl.where(small, y * 1e1, y), tl.where(small, e - 1, e)
    # The decade [0.1, 1) of y has n cells. The last level below it is nearest up to 0.2 cells.
    n = 1 << (tl.maximum(e, 0) + (0 if SIGNED else 1))
    cell = (y - 0.1) * (n.to(tl.float32) * 1.1111111111)
    below = cell < tl.where(e == 0, LOWEST, 0.2)
    u = n + tl.where(below, -1, tl.minimum(cell.to(tl.int32), n - 1))
    is_one = (e == 6) & (cell >= n.to(tl.float32) - 0.25)
    if SIGNED:
        u = tl.where(is_one & (x > 0), 128, u)
        u = tl.where(e < 0, 0, u)
        return tl.where(x < 0, 127 - u, 127 + u)
    u = tl.where(is_one, 256, u)
    u = tl.where(e < 0, 1, u)
    return tl.where(x > 0, tl.maximum(u, 2), u) - 1


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _scaled(value, absmax):
    """value / absmax [blocks, 256]; a block below the normal numbers keeps a smaller quotient."""
    return value * (1.0 / tl.maximum(absmax, 1.1754943508e-38))[:, None]


@triton.jit
def _words(key, stream, quads, ROUNDS: tl.constexpr):
    """Random words of the elements of `quads`, four each."""
    zero = tl.zeros_like(quads).to(tl.uint32)
    low, high = (stream & 0xFFFFFFFF).to(tl.uint32), (stream >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        key, quads.to(tl.uint32), zero + low, zero + high, zero, n_rounds=ROUNDS
    )
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.uint32)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _adamw_8bit_kernel(
    addresses_ptr,  # [T, 6] int64
    sizes_ptr,  # [T, 3] int64
    owners_ptr,  # [P] int32
    grad_scale_ptr,  # one float32
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,
    eps,
    decay,  # 1 - lr * weight_decay
    step_size,  # lr over the correction of m
    correction,  # 1 / sqrt(that of v)
    key_low,
    key_high,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    IS_8BIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (pieces); a piece is BLOCKS blocks of BLOCK elements. Legend: `_adamw_8bit_tables.py`.

    ALIGNED: addresses and sizes are multiples of 16, so that masks and pointers allow 16 bytes.
    """
    owner = tl.load(owners_ptr + tl.program_id(0)).to(tl.int64)
    addresses_ptr += owner * 6
    sizes_ptr += owner * 3
    STATE: tl.constexpr = tl.uint8 if IS_8BIT else tl.float32
    param_ptr = _pointer(tl.load(addresses_ptr), PARAM, ALIGNED)
    grad_ptr = _pointer(tl.load(addresses_ptr + 1), GRAD, ALIGNED)
    m_ptr = _pointer(tl.load(addresses_ptr + 2), STATE, ALIGNED)
    v_ptr = _pointer(tl.load(addresses_ptr + 3), STATE, ALIGNED)
    size = tl.load(sizes_ptr)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    piece = tl.program_id(0) - tl.load(sizes_ptr + 1)
    block = piece * BLOCKS + tl.arange(0, BLOCKS)
    offs = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = offs < size
    has_block = block * BLOCK < size
    grad = tl.load(grad_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        grad *= tl.load(grad_scale_ptr)
    # One state after the other, then the weight: fewer registers are held at once.
    m = tl.load(m_ptr + offs, mask=inside, other=0)
    if IS_8BIT:
        m_absmax_ptr = tl.load(addresses_ptr + 4).to(tl.pointer_type(tl.float32)) + block
        m = _level(m, True) * tl.load(m_absmax_ptr, mask=has_block, other=0.0)[:, None]
    # beyond the end: code 0 is not the level 0 of the signed map
    m = tl.where(inside, beta1 * m + rest1 * grad, 0.0)
    if IS_8BIT:
        m_absmax = tl.max(tl.abs(m), 1)
        tl.store(m_absmax_ptr, m_absmax, mask=has_block)
        tl.store(m_ptr + offs, _code(_scaled(m, m_absmax), True).to(tl.uint8), mask=inside)
    else:
        tl.store(m_ptr + offs, m, mask=inside)
    v = tl.load(v_ptr + offs, mask=inside, other=0)
    if IS_8BIT:
        v_absmax_ptr = tl.load(addresses_ptr + 5).to(tl.pointer_type(tl.float32)) + block
        v = _level(v, False) * tl.load(v_absmax_ptr, mask=has_block, other=0.0)[:, None]
    v = beta2 * v + rest2 * grad * grad
    update = step_size * (m / (tl.sqrt(v) * correction + eps))
    if IS_8BIT:
        v_absmax = tl.max(v, 1)
        tl.store(v_absmax_ptr, v_absmax, mask=has_block)
        tl.store(v_ptr + offs, _code(_scaled(v, v_absmax), False).to(tl.uint8), mask=inside)
    else:
        tl.store(v_ptr + offs, v, mask=inside)
    param = tl.load(param_ptr + offs, mask=inside, other=0.0).to(tl.float32) * decay - update
    if STOCHASTIC:
        quads = block[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
        key = (key_high.to(tl.uint64) << 32) | key_low.to(tl.uint64)
        words = _words(key, tl.load(sizes_ptr + 2), quads, ROUNDS)
        # rounds up with the probability of the part that is cut off; a NaN of GPUs, all ones, would
        # overflow
        bits = (param.to(tl.uint32, bitcast=True) + (words >> 16)) & 0xFFFF0000
        param = tl.where(param == param, bits.to(tl.float32, bitcast=True), param)
    tl.store(param_ptr + offs, param.to(PARAM), mask=inside)


def update(lists: Lists, rule: Rule, streams: Sequence[int]) -> None:
    """One step of every tensor, in place: one launch, two where some are not aligned."""
    kinds: dict[bool, list[int]] = {}
    for index, row in enumerate(zip(*lists, strict=True)):
        is_aligned = row[0].numel() % 16 == 0 and not any(x.data_ptr() % 16 for x in row[:4])
        kinds.setdefault(is_aligned, []).append(index)
    for is_aligned, chosen in kinds.items():
        _launch(lists.take(chosen), rule, [streams[i] for i in chosen], is_aligned)


def _launch(lists: Lists, rule: Rule, streams: Sequence[int], is_aligned: bool) -> None:
    tables = build_tables(lists, streams, PIECE_BLOCKS * BLOCK)
    if not sum(tables.pieces):
        return
    param, grad = lists.params[0], lists.grads[0]
    device, key = param.device, rule.key()
    addresses = tables.addresses.to(device, non_blocking=True)
    _adamw_8bit_kernel[(sum(tables.pieces),)](
        addresses,
        tables.sizes.to(device, non_blocking=True),
        owner_of_pieces(tables.pieces, device),
        addresses if rule.grad_scale is None else rule.grad_scale,
        *rule.factors(),
        key & 0xFFFFFFFF,
        key >> 32,
        PARAM=_DTYPES[param.dtype],
        GRAD=_DTYPES[grad.dtype],
        IS_8BIT=lists.exp_avgs[0].dtype == torch.uint8,
        HAS_SCALE=rule.grad_scale is not None,
        STOCHASTIC=rule.seed is not None and param.dtype == torch.bfloat16,
        ALIGNED=is_aligned,
        ROUNDS=ROUNDS,
        BLOCKS=PIECE_BLOCKS,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
