"""One large CPU buffer per dtype, kept between calls.

First touch of fresh memory costs as much as the GEMM that fills it (100 MB: 20 to 300 ms in page
faults and compaction, against 20 ms of multiplication). GPUs have torch's caching allocator; CPUs
have none, so the buffer of logits is kept: at most one per dtype, at most the memory budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ._csrc import advise_huge_pages

__all__ = ["kept_buffer", "release_kept_buffers"]

_KEPT: dict[torch.dtype, Tensor] = {}


@contextmanager
def kept_buffer(elements: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A flat buffer of at least `elements`, uninitialised, ours until the block ends."""
    if device.type != "cpu":
        yield torch.empty(elements, dtype=dtype, device=device)
        return
    # Taken out while in use: a second thread finds none and allocates its own.
    buffer = _KEPT.pop(dtype, None)
    if buffer is None or buffer.numel() < elements:
        buffer = advise_huge_pages(torch.empty(elements, dtype=dtype))
    try:
        yield buffer
    finally:
        _KEPT[dtype] = buffer


def release_kept_buffers() -> None:
    """Give the kept memory back; the next call allocates again."""
    _KEPT.clear()
