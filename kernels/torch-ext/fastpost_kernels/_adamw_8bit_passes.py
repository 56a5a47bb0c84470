"""The step of `adamw_8bit_` on each backend: Triton, csrc/adamw_8bit.cpp, plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._adamw_8bit_tables import PIECE_BLOCKS, Lists, Rule, build_tables
from ._csrc import library, num_threads
from ._dynamic_map import BLOCK, dequantize, levels, num_blocks, quantize
from ._philox import random_words

__all__ = ["update", "update_cpp", "update_torch", "workspace"]

_CHUNK = 1 << 18  # elements that the torch backend widens at once
# Less than this per thread, and waking it costs more than it saves.
_BLOCKS_PER_THREAD = 64


def update(lists: Lists, rule: Rule, streams: Sequence[int], backend: str) -> None:
    """One step of every tensor, in place; `backend` is "triton", "cpp" or "torch"."""
    if backend == "triton":
        from . import _adamw_8bit_triton  # Triton is optional, and slow to import

        _adamw_8bit_triton.update(lists, rule, streams)
    elif backend == "cpp":
        update_cpp(lists, rule, streams)
    else:
        update_torch(lists, rule, streams)


def workspace(sizes: Sequence[int], backend: str) -> int:
    """Bytes beyond the arguments: tables, and what the torch backend widens."""
    tables = len(sizes) * 8 * 9
    if backend == "torch":
        # about 12 widened copies of a chunk, and int64 codes and words of four rounds' length
        return tables + min(_CHUNK, max(sizes, default=0)) * (12 * 4 + 12 * 8)
    pieces = sum(-(-size // (PIECE_BLOCKS * BLOCK)) for size in sizes)
    return 2 * tables + 12 * pieces


def update_cpp(lists: Lists, rule: Rule, streams: Sequence[int], simd_limit: int = -1) -> None:
    lib = library()
    assert lib is not None
    tables = build_tables(lists, streams, BLOCK)
    factors = torch.tensor(rule.factors(), dtype=torch.float32)
    blocks = sum(tables.pieces)
    lib.fastpost_adamw_8bit(
        lists.params[0].dtype == torch.bfloat16,
        lists.grads[0].dtype == torch.bfloat16,
        lists.exp_avgs[0].dtype == torch.uint8,
        tables.addresses.data_ptr(),
        tables.sizes.data_ptr(),
        factors.data_ptr(),
        len(lists.params),
        blocks,
        levels(True).data_ptr(),
        levels(False).data_ptr(),
        1.0 if rule.grad_scale is None else float(rule.grad_scale),
        rule.seed is not None,
        rule.key(),
        simd_limit,
        max(1, min(num_threads(), blocks // _BLOCKS_PER_THREAD)),
    )


def update_torch(lists: Lists, rule: Rule, streams: Sequence[int]) -> None:
    for tensors, stream in zip(zip(*lists, strict=True), streams, strict=True):
        flat = [tensor.view(-1) for tensor in tensors]
        for begin in range(0, flat[0].numel(), _CHUNK):
            end = min(begin + _CHUNK, flat[0].numel())
            first, last = begin // BLOCK, num_blocks(end)
            chunk = [x[begin:end] for x in flat[:4]] + [x[first:last] for x in flat[4:]]
            _update_chunk(chunk, rule, stream, begin)


def _update_chunk(chunk: Sequence[Tensor], rule: Rule, stream: int, begin: int) -> None:
    param, grad, exp_avg, exp_avg_sq, absmax, absmax_sq = chunk
    beta1, rest1, beta2, rest2, eps, decay, step_size, correction = rule.factors()
    gradient = grad.float()
    if rule.grad_scale is not None:
        gradient = gradient * rule.grad_scale
    is_8bit = exp_avg.dtype == torch.uint8
    m = dequantize(exp_avg, absmax, signed=True) if is_8bit else exp_avg
    v = dequantize(exp_avg_sq, absmax_sq, signed=False) if is_8bit else exp_avg_sq
    m = beta1 * m + rest1 * gradient
    v = beta2 * v + rest2 * gradient * gradient
    updated = param.float() * decay - step_size * (m / (v.sqrt() * correction + eps))
    if rule.seed is not None and param.dtype == torch.bfloat16:
        words = random_words(
            rule.key(), 1, param.numel(), param.device, first_row=stream, first_col=begin
        )
        updated = _round_at_random(updated, words[0])
    param.copy_(updated)
    if is_8bit:
        for values, signed, codes, largest in (
            (m, True, exp_avg, absmax),
            (v, False, exp_avg_sq, absmax_sq),
        ):
            new_codes, new_absmax = quantize(values, signed)
            codes.copy_(new_codes)
            largest.copy_(new_absmax)
    else:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)


def _round_at_random(values: Tensor, words: Tensor) -> Tensor:
    """float32 with 16 low bits of 0: up with the probability of the part that is cut off."""
    bits = values.view(torch.int32).long() + (words >> 16)
    rounded = (bits & ~0xFFFF).to(torch.int32).view(torch.float32)
    return torch.where(values.isnan(), values, rounded)
