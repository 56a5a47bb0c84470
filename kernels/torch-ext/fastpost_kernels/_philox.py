"""Counter-based random words: Philox 4x32 with 7 rounds, the same on every backend.

A word is a function of (seed, row, column) alone: nothing is stored between a forward and its
backward, and results do not depend on threads, blocks or the order of rows. Seven rounds pass
BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2). Counter
(column // 4, row's low word, row's high word, 0), key the seed; the four words of a counter belong
to four adjacent columns. `csrc/adapter_passes.cpp` and the Triton kernels compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ROUNDS", "random_words", "threshold_of"]

ROUNDS = 7
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def threshold_of(probability: float) -> int:
    """The word below which an event of `probability` happens."""
    return min(_LOW, round(probability * 2**32))


def random_words(
    seed: int,
    rows: int,
    cols: int,
    device: torch.device | str = "cpu",
    *,
    first_row: int = 0,
    first_col: int = 0,
) -> Tensor:
    """[rows, cols] int64 holding uniform 32-bit words; `first_col` is a multiple of 4."""
    row = first_row + torch.arange(rows, device=device)[:, None]
    quad = first_col // 4 + torch.arange(-(-cols // 4), device=device)[None, :]
    zero = torch.zeros_like(row + quad)
    words = [quad + zero, (row & _LOW) + zero, (row >> 32) + zero, zero]
    key0, key1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(ROUNDS):
        (high_a, low_a), (high_b, low_b) = _product(_M0, words[0]), _product(_M1, words[2])
        words = [high_b ^ words[1] ^ key0, low_b, high_a ^ words[3] ^ key1, low_a]
        key0, key1 = key0 + _W0 & _LOW, key1 + _W1 & _LOW
    return torch.stack(words, -1).view(rows, -1)[:, :cols]


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * word; the full product does not fit a signed 64-bit int."""
    low = factor * (word & 0xFFFF)
    high = factor * (word >> 16) + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & _LOW
