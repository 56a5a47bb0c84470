"""What one launch of `adamw_8bit_` is told of its tensors: addresses, sizes, owners.

All tensors of a launch are cut into pieces of equal length, numbered in a row. A piece finds its
tensor in `owners`, and there the rest: nothing depends on shapes but these tables, so no shape
compiles a kernel again. They weigh 72 bytes a tensor and 4 bytes a piece.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PIECE_BLOCKS", "Lists", "Rule", "Tables", "build_tables", "owner_of_pieces"]

PIECE_BLOCKS = 8  # blocks of 256 elements in a piece


class Lists(NamedTuple):
    """Tensors of one launch, entry i of each list belonging together."""

    params: Sequence[Tensor]  # contiguous, of one dtype
    grads: Sequence[Tensor]  # contiguous, of one dtype
    exp_avgs: Sequence[Tensor]  # uint8, or float32 without absmax
    exp_avg_sqs: Sequence[Tensor]
    absmaxes: Sequence[Tensor]  # [blocks] float32 of exp_avgs, empty for float32 states
    absmax_sqs: Sequence[Tensor]

    def take(self, chosen: Sequence[int]) -> Lists:
        return Lists(*([tensors[i] for i in chosen] for tensors in self))


class Rule(NamedTuple):
    """What all tensors of one launch have in common."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: Tensor | None  # one float32
    seed: int | None  # of 32 bits, for stochastic rounding

    def factors(self) -> tuple[float, ...]:
        """beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr decay, lr / c1, 1 / sqrt(c2)."""
        correction1, correction2 = 1 - self.beta1**self.step, 1 - self.beta2**self.step
        return (
            self.beta1,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            self.eps,
            1 - self.lr * self.weight_decay,
            self.lr / correction1,
            correction2**-0.5,
        )

    def key(self) -> int:
        """Of this step's random words: 63 bits."""
        return (self.step & 0x7FFFFFFF) << 32 | (self.seed or 0)


class Tables(NamedTuple):
    """On the CPU. T tensors."""

    addresses: Tensor  # [T, 6] int64, in the order of `Lists`
    sizes: Tensor  # [T, 3] int64: elements, first piece, row of the random words
    pieces: tuple[int, ...]  # of each tensor


def build_tables(lists: Lists, streams: Sequence[int], piece: int) -> Tables:
    """`streams`: the row of each tensor's random words. `piece`: elements of one."""
    addresses = [[tensor.data_ptr() for tensor in row] for row in zip(*lists, strict=True)]
    pieces = tuple(-(-param.numel() // piece) for param in lists.params)
    sizes, first = [], 0
    for param, stream, count in zip(lists.params, streams, pieces, strict=True):
        sizes.append([param.numel(), first, stream])
        first += count
    return Tables(
        torch.tensor(addresses, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64), pieces
    )


@functools.lru_cache(maxsize=16)
def owner_of_pieces(pieces: tuple[int, ...], device: torch.device) -> Tensor:
    """[P] int32: the tensor of each piece. Kept: it changes with the list of tensors only."""
    counts = torch.tensor(pieces, dtype=torch.int64)
    return torch.repeat_interleave(counts).to(device=device, dtype=torch.int32)
