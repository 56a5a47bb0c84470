"""The tile passes of `_vocab_passes.py` for CPU tensors in C++ (fp32 and bf16 tiles)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._csrc import library, num_threads
from ._vocab_passes import LogitTransform, significant
from ._vocab_passes import multiply_accumulate as torch_multiply_accumulate

__all__: list[str] = ["significant"]

BEST_SIMD = -1


def _run_tile(
    is_fold: bool,
    tile: Tensor,
    table: Tensor,
    targets: Tensor,
    first_col: int,
    bias: Tensor | None,
    transform: LogitTransform,
    moments: bool,
    store_exp: bool,
    simd_limit: int,
) -> None:
    assert tile.stride(1) == 1 and table.stride(1) == 1 and targets.is_contiguous()
    assert table.dtype == torch.float32 and tile.dtype in (torch.float32, torch.bfloat16)
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    lib = library()
    assert lib is not None
    lib.fastpost_logit_tile(
        is_fold,
        tile.dtype == torch.bfloat16,
        tile.data_ptr(),
        tile.stride(0),
        tile.shape[0],
        tile.shape[1],
        targets.data_ptr(),
        first_col,
        None if bias is None else bias.data_ptr(),
        transform.logit_scale,
        0.0 if transform.softcap is None else transform.softcap,
        1.0 / transform.temperature,
        table.data_ptr(),
        table.stride(0),
        moments,
        store_exp,
        simd_limit,
        num_threads(),
    )


def fold(
    tile: Tensor,
    state: Tensor,
    targets: Tensor,
    first_col: int,
    bias: Tensor | None,
    transform: LogitTransform,
    *,
    moments: bool,
    top1: bool,
    store_exp: bool,
    simd_limit: int = BEST_SIMD,
) -> None:
    """See `_vocab_passes.fold`; the TOP rows are always kept, they come with the maximum."""
    _run_tile(
        True, tile, state, targets, first_col, bias, transform, moments, store_exp, simd_limit
    )


def gradient(
    tile: Tensor,
    coefs: Tensor,
    targets: Tensor,
    first_col: int,
    bias: Tensor | None,
    transform: LogitTransform,
    *,
    simd_limit: int = BEST_SIMD,
) -> None:
    """See `_vocab_passes.gradient`."""
    _run_tile(False, tile, coefs, targets, first_col, bias, transform, False, False, simd_limit)


def multiply_accumulate(
    acc: Tensor,
    a: Tensor,
    b: Tensor,
    scratch: Tensor | None,
    rescale: Tensor | None = None,
    *,
    simd_limit: int = BEST_SIMD,
) -> None:
    """See `_vocab_passes.multiply_accumulate`; rescaling and adding are one pass over `acc`."""
    if scratch is None:
        torch_multiply_accumulate(acc, a, b, scratch, rescale)
        return
    torch.mm(a, b, out=scratch)
    assert acc.is_contiguous() and scratch.is_contiguous() and scratch.dtype == torch.bfloat16
    assert rescale is None or rescale.is_contiguous()
    lib = library()
    assert lib is not None
    lib.fastpost_accumulate(
        acc.data_ptr(),
        scratch.data_ptr(),
        acc.shape[0],
        acc.shape[1],
        None if rescale is None else rescale.data_ptr(),
        simd_limit,
        num_threads(),
    )
