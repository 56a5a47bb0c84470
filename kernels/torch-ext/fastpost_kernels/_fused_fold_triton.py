# mypy: disable-error-code="no-untyped-def"
# (arguments of jit functions are pointers and constexprs, which have no Python types)
"""The fold of `_vocab_passes.py` with its GEMM inside: statistics of logits that are never stored.

    y = h W^T + b  by blocks in registers,   state <- fold(state, y)

The tile path writes each tile of logits once, in the GEMM's dtype, and reads it once. Here a
program multiplies a block of rows with one block of the vocabulary after the other (`tl.dot`, sums
in fp32) and folds each product before the next: no logits in memory, none rounded to 16 bits.

Strategy. The vocabulary is split into ranges so that every multiprocessor has several programs. A
program starts from the state's reference, walks its range and stores what it summed; a second
kernel merges the ranges of a row in a fixed tree. No atomics: the same bits on every run.
Row blocks are grouped: programs that run at a time share a few row blocks and a few ranges, so
that the L2 cache serves most reads of both. From compute capability 9.0 on, blocks come through
the tensor memory accelerator, which leaves the registers to the products.

Only for folds without an accumulator: no gradient, or the forward of a trained head. A frozen
head's accumulator is [m, H] in fp32: 128 rows of H 4096 are 2 MB, and a multiprocessor has 256 KB
of registers. Cut along H, the logits would have to be multiplied once for each cut. The gradients
of a trained head sum over rows and meet the same wall ([n, H]). Those walks stay with cuBLAS and
tiles, which write and read each logit once more; a fused backward pays with recomputed products and
atomics instead.

Whether this beats the tile path depends on how close `tl.dot` comes to cuBLAS on the GPU at hand,
so it runs only where `fastpost tune` measured it faster (`_choices.py`).

FLOPs: 2 m H V, and about ten a logit. Bytes: hidden and weight once if the L2 cache holds a group's
rows, and up to 4 * 8 * m per range of partial states.
Legend: m rows, H width, V vocabulary, S ranges, K sums of a range.
Source: the forward of Wijmans et al., "Cut your losses" (arXiv:2411.09009), algorithm 1, which
merges under locks; the grouped order of programs is that of Triton's tutorial on matrix products.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._device import AMD, capability
from ._vocab_passes import MAX_LAG, STATE_ROWS, LogitTransform
from ._vocab_passes_triton import _transform

__all__ = ["Blocks", "choose_blocks", "fold_products", "split_vocabulary"]

# What a range of the vocabulary leaves per row: reference and sum; three moments; three maxima.
ROWS_ALWAYS, ROWS_MOMENTS, ROWS_TOP1 = 2, 3, 3
# Vocabulary blocks of a range: more leave fewer partial states, fewer balance the multiprocessors.
MAX_BLOCKS_PER_RANGE = 8
WAVES = 8  # programs per multiprocessor before ranges grow
GROUP_ROWS = 16  # row blocks that share a stretch of the vocabulary
HALVINGS = 3  # products are folded an eighth of a block at a time
# The merge holds all ranges of a few rows in registers: 16 values a thread.
MAX_RANGES = 512
MERGE_ELEMENTS = 2048


@triton.jit
def _products(
    hidden_ptr,
    weight_ptr,
    stride_hidden,
    stride_weight,
    first_m,
    first_v,
    rows,
    vocab,
    width,
    USE_TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """h W^T of one block, [BLOCK_M, BLOCK_V] fp32; rows and columns outside hold anything."""
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if USE_TMA:
        for start in range(0, width, BLOCK_H):
            hidden = hidden_ptr.load([first_m, start])
            weight = weight_ptr.load([first_v, start])
            acc = tl.dot(hidden, weight.T, acc, input_precision="ieee")
    else:
        offs_h = tl.arange(0, BLOCK_H)
        # The last row again instead of a mask.
        offs_m = tl.minimum(first_m + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
        offs_v = tl.minimum(first_v + tl.arange(0, BLOCK_V), vocab - 1).to(tl.int64)
        hidden_ptrs = hidden_ptr + offs_m[:, None] * stride_hidden + offs_h[None, :]
        weight_ptrs = weight_ptr + offs_v[:, None] * stride_weight + offs_h[None, :]
        for start in range(0, width, BLOCK_H):
            if EVEN_H:
                hidden = tl.load(hidden_ptrs)
                weight = tl.load(weight_ptrs)
            else:
                inside = (start + offs_h < width)[None, :]
                hidden = tl.load(hidden_ptrs, mask=inside, other=0.0)
                weight = tl.load(weight_ptrs, mask=inside, other=0.0)
            acc = tl.dot(hidden, weight.T, acc, input_precision="ieee")
            hidden_ptrs += BLOCK_H
            weight_ptrs += BLOCK_H
    return acc


@triton.jit
def _halves(blocks, BLOCK_M: tl.constexpr, COLS: tl.constexpr):
    """Of every block [BLOCK_M, COLS] its left and its right half."""
    halves = ()
    for i in tl.static_range(len(blocks)):
        halves += blocks[i].reshape(BLOCK_M, 2, COLS // 2).permute(0, 2, 1).split()
    return halves


@triton.jit
def _fold_columns(
    sums,
    y,  # [BLOCK_M, COLS]
    first,
    vocab,
    target,  # [BLOCK_M] int32
    bias_ptr,
    logit_scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    LAG: tl.constexpr,
    COLS: tl.constexpr,
):
    """`sums` after columns [first, first + COLS): the arithmetic of `_vocab_passes.fold`."""
    ref, total, xsum, squares, zsum, top_self, before, after = sums
    place = tl.arange(0, COLS)
    local = (target - first)[:, None]
    inside = (place < vocab - first)[None, :]
    place = place[None, :]
    if HAS_BIAS:
        columns = tl.minimum(first + tl.arange(0, COLS), vocab - 1)
        y += tl.load(bias_ptr + columns)[None, :]
    if HAS_TOP1:
        at_target = tl.where(inside & (place == local), y, -float("inf"))
        top_self = tl.maximum(top_self, tl.max(at_target, axis=1))
        ahead = tl.where(inside & (place < local), y, -float("inf"))
        before = tl.maximum(before, tl.max(ahead, axis=1))
        behind = tl.where(inside & (place > local), y, -float("inf"))
        after = tl.maximum(after, tl.max(behind, axis=1))
    others = inside & (place != local)
    z, _ = _transform(y, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
    zmax = tl.max(tl.where(others, z, -float("inf")), axis=1)
    old_ref = ref
    ref = tl.where(zmax - old_ref > LAG, zmax, old_ref)
    moved = tl.where(ref == old_ref, 0.0, old_ref - ref)
    rescale = tl.exp(moved)
    d = z - ref[:, None]
    e = tl.where(others, tl.exp(d), 0.0)
    if HAS_MOMENTS:
        xsum = (xsum + moved * total) * rescale
        xsum += tl.sum(e * tl.where(e == 0.0, 0.0, d), axis=1)
        squares = squares * rescale * rescale + tl.sum(e * e, axis=1)
        zsum += tl.sum(tl.where(others, z, 0.0), axis=1)
    total = total * rescale + tl.sum(e, axis=1)
    return ref, total, xsum, squares, zsum, top_self, before, after


@triton.jit(do_not_specialize=["first_col", "group", "blocks_per_range"])
def _linear_logprob_fused_fold_kernel(
    # pointers
    hidden_ptr,  # [m, H]; with USE_TMA a descriptor of blocks, as is the weight
    weight_ptr,  # [V, H]
    bias_ptr,  # [V] fp32
    targets_ptr,  # [m] int64
    state_ptr,  # [9, m] fp32, only its first row is read
    parts_ptr,  # [S, K, m] fp32
    # strides and sizes
    stride_hidden,
    stride_weight,
    stride_parts,
    first_col,
    rows,
    vocab,
    width,
    group,
    blocks_per_range,
    # scalars
    logit_scale,
    softcap,
    inv_temperature,
    # flags
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    LAG: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HALVINGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (group * S, groups): one block of rows over one range of the vocabulary. Programs start
    along the first axis first: all ranges of a group of row blocks, then those of the next."""
    block_m = tl.program_id(1) * group + tl.program_id(0) % group
    index = tl.program_id(0) // group
    if block_m * BLOCK_M >= rows:
        return

    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    lines = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = lines < rows
    target = (tl.load(targets_ptr + lines, mask=mask_m, other=0) - first_col).to(tl.int32)
    ref = tl.load(state_ptr + lines, mask=mask_m, other=0.0)
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    lowest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    sums = (ref, zeros, zeros, zeros, zeros, lowest, lowest, lowest)

    last_block = tl.minimum((index + 1) * blocks_per_range, tl.cdiv(vocab, BLOCK_V))
    for block in range(index * blocks_per_range, last_block):
        first = block * BLOCK_V
        y = _products(
            hidden_ptr, weight_ptr, stride_hidden, stride_weight, block_m * BLOCK_M, first,
            rows, vocab, width, USE_TMA, EVEN_H, BLOCK_M, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        # A part of the columns after the other: temporaries of all of them do not fit.
        parts = (y,)
        for level in tl.static_range(HALVINGS):
            parts = _halves(parts, BLOCK_M, BLOCK_V >> level)
        for part in tl.static_range(1 << HALVINGS):
            sums = _fold_columns(
                sums, parts[part], first + part * (BLOCK_V >> HALVINGS), vocab, target, bias_ptr,
                logit_scale, softcap, inv_temperature,
                HAS_BIAS, HAS_SOFTCAP, HAS_MOMENTS, HAS_TOP1, LAG, BLOCK_V >> HALVINGS,
            )  # fmt: skip

    ref, total, xsum, squares, zsum, top_self, before, after = sums
    out_ptrs = parts_ptr + index.to(tl.int64) * NUM_PARTS * stride_parts + lines
    tl.store(out_ptrs, ref, mask=mask_m)
    tl.store(out_ptrs + stride_parts, total, mask=mask_m)
    if HAS_MOMENTS:
        tl.store(out_ptrs + 2 * stride_parts, xsum, mask=mask_m)
        tl.store(out_ptrs + 3 * stride_parts, squares, mask=mask_m)
        tl.store(out_ptrs + 4 * stride_parts, zsum, mask=mask_m)
    if HAS_TOP1:
        top_ptrs = out_ptrs + (NUM_PARTS - 3) * stride_parts
        tl.store(top_ptrs, top_self, mask=mask_m)
        tl.store(top_ptrs + stride_parts, before, mask=mask_m)
        tl.store(top_ptrs + 2 * stride_parts, after, mask=mask_m)


@triton.jit
def _linear_logprob_merge_kernel(
    # pointers
    parts_ptr,  # [S, K, m] fp32
    state_ptr,  # [9, m] fp32
    # strides and sizes
    stride_parts,
    stride_state,
    rows,
    ranges,
    # flags
    HAS_MOMENTS: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (cdiv(m, BLOCK_R),): the partial states of BLOCK_R rows join what `state` holds."""
    offs_s = tl.arange(0, BLOCK_S)
    lines = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = lines < rows
    mask = (offs_s < ranges)[:, None] & mask_r[None, :]
    ptrs = parts_ptr + offs_s.to(tl.int64)[:, None] * NUM_PARTS * stride_parts + lines[None, :]
    st_ptrs = state_ptr + lines
    old_ref = tl.load(st_ptrs, mask=mask_r, other=0.0)
    # Absent ranges repeat the state's reference, so that a NaN in it meets no number.
    refs = tl.where(mask, tl.load(ptrs, mask=mask, other=0.0), old_ref[None, :])
    # References only ever rise from the state's: the highest serves all.
    ref = tl.max(refs, axis=0)
    moved = tl.where(refs == ref[None, :], 0.0, refs - ref[None, :])
    rescale = tl.exp(moved)
    old_moved = tl.where(old_ref == ref, 0.0, old_ref - ref)
    old_rescale = tl.exp(old_moved)
    totals = tl.load(ptrs + stride_parts, mask=mask, other=0.0)
    old_total = tl.load(st_ptrs + stride_state, mask=mask_r, other=0.0)
    if HAS_MOMENTS:
        parts = tl.load(ptrs + 2 * stride_parts, mask=mask, other=0.0)
        old = tl.load(st_ptrs + 2 * stride_state, mask=mask_r, other=0.0)
        xsum = (old + old_moved * old_total) * old_rescale
        xsum += tl.sum((parts + moved * totals) * rescale, axis=0)
        tl.store(st_ptrs + 2 * stride_state, xsum, mask=mask_r)
        parts = tl.load(ptrs + 3 * stride_parts, mask=mask, other=0.0)
        old = tl.load(st_ptrs + 3 * stride_state, mask=mask_r, other=0.0)
        squares = old * old_rescale * old_rescale + tl.sum(parts * rescale * rescale, axis=0)
        tl.store(st_ptrs + 3 * stride_state, squares, mask=mask_r)
        parts = tl.load(ptrs + 4 * stride_parts, mask=mask, other=0.0)
        old = tl.load(st_ptrs + 4 * stride_state, mask=mask_r, other=0.0)
        tl.store(st_ptrs + 4 * stride_state, old + tl.sum(parts, axis=0), mask=mask_r)
    if HAS_TOP1:
        for row in tl.static_range(3):
            part_ptrs = ptrs + (NUM_PARTS - 3 + row) * stride_parts
            tops = tl.max(tl.load(part_ptrs, mask=mask, other=-float("inf")), axis=0)
            top_ptrs = st_ptrs + (5 + row) * stride_state
            old = tl.load(top_ptrs, mask=mask_r, other=0.0)
            tl.store(top_ptrs, tl.maximum(old, tops), mask=mask_r)
    total = old_total * old_rescale + tl.sum(totals * rescale, axis=0)
    tl.store(st_ptrs + stride_state, total, mask=mask_r)
    tl.store(st_ptrs, ref, mask=mask_r)


class Blocks(NamedTuple):
    """What one program multiplies at a time, and how many warps and stages it gets."""

    rows: int
    cols: int
    width: int
    warps: int
    stages: int


def choose_blocks(itemsize: int, capability: int, is_aligned: bool, is_plain: bool) -> Blocks:
    """For elements of `itemsize` bytes on `capability` 80, 90, 100 or AMD. None was timed.

    `is_plain` is a fold of reference and sum alone: on sm_90 the options do not fit beside 256
    columns of products. With aligned 16-bit rows none spills, with or without every option, which a
    test asserts.
    """
    if itemsize > 2 or not is_aligned:
        # For checks rather than speed: fp32 products do not use tensor cores, and rows out of
        # alignment are loaded an element at a time.
        return Blocks(64, 64, 32, 4, 2)
    if capability == AMD:  # 64 KB of local memory
        return Blocks(128, 128, 32, 4, 2)
    if capability == 100 or (capability == 90 and is_plain):
        return Blocks(128, 256, 64, 8, 3)
    return Blocks(128, 128, 64, 8, 4 if capability == 90 else 3)


def _is_aligned(x: Tensor) -> bool:
    """Whether rows of x [rows, H] start at multiples of 16 bytes and are whole blocks of 64."""
    return (x.data_ptr() | x.stride(0) * x.itemsize) % 16 == 0 and x.shape[1] % 64 == 0


def split_vocabulary(row_blocks: int, vocab_blocks: int, processors: int, limit: int) -> int:
    """Vocabulary blocks of a range: enough programs for `processors`, at most `limit` ranges."""
    wanted = row_blocks * vocab_blocks // max(1, WAVES * processors)
    fitting = -(-vocab_blocks // max(1, min(limit, MAX_RANGES)))
    return max(1, min(wanted, MAX_BLOCKS_PER_RANGE), fitting)


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; a GPU's size where nobody can be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 128


def fold_products(
    hidden: Tensor,  # [m, H], rows contiguous
    weight: Tensor,  # [V, H] in the dtype of hidden, rows contiguous
    state: Tensor,  # [9, m] fp32, updated
    targets: Tensor,  # [m] int64
    first_col: int,
    bias: Tensor | None,  # [V] fp32
    transform: LogitTransform,
    scratch: Tensor,  # contiguous, not overlapping, at least 36 m bytes: the partial states
    *,
    moments: bool,
    top1: bool,
) -> None:
    """`_vocab_passes.fold` of the product hidden @ weight.T, columns [first_col, first_col + V).

    RESCALE stays as it was: there is no accumulator that could need it.
    """
    rows, width = hidden.shape
    vocab = weight.shape[0]
    assert hidden.dtype == weight.dtype and hidden.stride(1) == weight.stride(1) == 1
    assert state.shape == (STATE_ROWS, rows) and state.stride(1) == 1
    if rows == 0 or vocab == 0:
        return
    gpu = capability(hidden.device)
    is_plain = not (moments or top1 or bias is not None or transform.softcap is not None)
    is_aligned = _is_aligned(hidden) and _is_aligned(weight)
    blocks = choose_blocks(hidden.itemsize, gpu, is_aligned, is_plain)
    num_parts = ROWS_ALWAYS + ROWS_MOMENTS * moments + ROWS_TOP1 * top1
    flat = scratch.view(-1).view(torch.float32)
    stride_parts = -(-rows // 4) * 4  # 16 bytes, as vector loads want them
    limit = flat.numel() // (num_parts * stride_parts)
    assert limit >= 1, f"scratch of {scratch.nbytes} bytes holds no state of {rows} rows"
    row_blocks, vocab_blocks = triton.cdiv(rows, blocks.rows), triton.cdiv(vocab, blocks.cols)
    blocks_per_range = split_vocabulary(row_blocks, vocab_blocks, _processors(hidden.device), limit)
    ranges = triton.cdiv(vocab_blocks, blocks_per_range)
    parts = flat[: ranges * num_parts * stride_parts]
    use_tma = is_aligned and hidden.itemsize == 2 and gpu in (90, 100)
    groups = triton.cdiv(row_blocks, GROUP_ROWS)
    group = triton.cdiv(row_blocks, groups)
    flags = {"HAS_MOMENTS": moments, "HAS_TOP1": top1, "NUM_PARTS": num_parts}
    _linear_logprob_fused_fold_kernel[(group * ranges, groups)](
        TensorDescriptor.from_tensor(hidden, [blocks.rows, blocks.width]) if use_tma else hidden,
        TensorDescriptor.from_tensor(weight, [blocks.cols, blocks.width]) if use_tma else weight,
        state if bias is None else bias,
        targets,
        state,
        parts,
        hidden.stride(0),
        weight.stride(0),
        stride_parts,
        first_col,
        rows,
        vocab,
        width,
        group,
        blocks_per_range,
        transform.logit_scale,
        1.0 if transform.softcap is None else transform.softcap,
        1.0 / transform.temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=transform.softcap is not None,
        USE_TMA=use_tma,
        EVEN_H=width % blocks.width == 0,
        LAG=MAX_LAG,
        HALVINGS=HALVINGS,
        BLOCK_M=blocks.rows,
        BLOCK_V=blocks.cols,
        BLOCK_H=blocks.width,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **flags,
    )
    block_s = triton.next_power_of_2(ranges)
    block_r = max(4, min(128, MERGE_ELEMENTS // block_s))
    _linear_logprob_merge_kernel[(triton.cdiv(rows, block_r),)](
        parts,
        state,
        stride_parts,
        state.stride(0),
        rows,
        ranges,
        BLOCK_S=block_s,
        BLOCK_R=block_r,
        num_warps=4,
        **flags,
    )
