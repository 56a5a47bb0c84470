"""A hash of every window of n integers, all at once.

    h_i = sum_j mix(x_(i+j)) B^(n-1-j)  mod 2^64

Source: rolling hashes, Karp and Rabin, IBM J. Res. Dev. 31 (1987).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BASE", "finished", "mixed", "rolling"]

BASE = 0x9E3779B97F4A7C15


def mixed(ids: NDArray[Any]) -> NDArray[np.uint64]:
    """Ids to well-spread integers (the finaliser of splitmix64)."""
    x = ids.astype(np.uint64) * np.uint64(BASE) + np.uint64(1)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rolling(values: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Polynomial hash of every window of n values, by doubling the window's length."""
    total, covered = np.zeros(len(values) - n + 1, np.uint64), 0
    power, length = values, 1  # hashes of windows of `length`
    rest = n
    while rest:
        if rest & 1:
            part = power[covered : covered + len(total)]
            total = total * np.uint64(pow(BASE, length, 1 << 64)) + part
            covered += length
        rest >>= 1
        if rest:
            power = power[:-length] * np.uint64(pow(BASE, length, 1 << 64)) + power[length:]
            length *= 2
    return total


def finished(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread over all bits: the filter reads the leading ones."""
    return (hashes ^ (hashes >> np.uint64(32))) * np.uint64(BASE)
