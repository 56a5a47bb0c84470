"""Logits that the head keeps from one call to the next on CPUs, where first touch is dear."""

from __future__ import annotations

from typing import Any

from fastpost_kernels._cross_entropy_walks import plan, resident_rows
from fastpost_kernels._vocab_tiles import resident_size

__all__ = ["kept_logits_bytes"]


def kept_logits_bytes(args: tuple[Any, ...]) -> int:
    """Bytes kept after a call of `linear_cross_entropy_fwd` with these arguments."""
    (rows, _), (vocab, _) = args[0].shape, args[1].shape
    rest = args[2:]
    smoothing, needs = rest[6], tuple(rest[12:17])
    _, dtype, budget, filter_eps = rest[17:]
    filtered = filter_eps is not None
    strategy = plan(rows, vocab, dtype.itemsize, smoothing, needs, budget, filtered)
    if strategy != "resident":
        return 0
    chunk = resident_rows(rows, vocab, dtype.itemsize, needs[1], budget)
    return resident_size(chunk, vocab) * dtype.itemsize
