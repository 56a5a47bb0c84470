"""What the ranks of a vocabulary-parallel head tell each other before they start: one all-gather.

A rank that raised alone would leave the others waiting in their next collective. So every rank says
whether it accepts its arguments, which rows of the head it holds and what must be equal everywhere;
all read the same table, and so all go on or all raise. The table is ROW_WORDS int64 a rank.

A rank whose arguments are refused before its op runs calls `refuse` instead of `agree`.
Errors behind this point (memory that runs out, say) are not announced: the process group's own
timeout ends the others.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from ._vocab_tiles import IGNORE

__all__ = ["ROW_WORDS", "Group", "Terms", "agree", "refuse"]

# What all ranks pass equally, by the names of the error.
SHARED = (
    "the rows of hidden",
    "the width of hidden",
    "vocab_size",
    "memory_budget",
    "compute_dtype",
    "outputs",
    "what needs gradients",
    "whether there is a bias",
    "logit_scale",
    "softcap",
    "temperature",
    "targets",
)
ACCEPTED, START, END, NUM_BAD, BAD_ROW, BAD_TARGET, FIRST_SHARED = range(7)
ROW_WORDS = FIRST_SHARED + len(SHARED)


class Group(NamedTuple):
    """A process group as ops can take it."""

    name: str
    size: int

    def all_reduce(self, x: Tensor, how: str) -> Tensor:
        """`x` summed ("sum") or maximised ("max") over the ranks, in place; `x` contiguous."""
        assert x.is_contiguous()
        if x.numel() == 0:  # as on every other rank
            return x
        return _wait(torch.ops._c10d_functional.all_reduce_(x, how, self.name))

    def all_gather(self, x: Tensor) -> Tensor:
        """[k] of every rank, [size, k] in the order of ranks."""
        gather = torch.ops._c10d_functional.all_gather_into_tensor
        return _wait(gather(x, self.size, self.name)).view(self.size, -1)


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


class Terms(NamedTuple):
    """What a rank brings; `options` are numbers in the order of SHARED from `memory_budget` on."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [Vr, H]
    targets: Tensor  # [M]
    vocab_start: int
    vocab_size: int
    options: tuple[float, ...]


def agree(group: Group, terms: Terms) -> None:
    """Compare every rank's terms.

    Raises:
        ValueError: on all ranks alike: a rank refused its arguments, a target outside
            [0, vocab_size) that is not -100, shards that do not tile the vocabulary, or terms that
            differ between ranks.
    """
    table = group.all_gather(_row(terms)).tolist()
    refused = [rank for rank, row in enumerate(table) if not row[ACCEPTED]]
    if refused:
        raise ValueError(
            f"ranks {refused} of the group refused their arguments; their own errors say why"
        )
    vocab = terms.vocab_size
    for rank, row in enumerate(table):
        if row[NUM_BAD]:
            raise ValueError(
                f"targets[{row[BAD_ROW]}] = {row[BAD_TARGET]} ({row[NUM_BAD]} such rows on rank "
                f"{rank} of the group): expected 0 <= target < {vocab} (the vocabulary of all "
                f"ranks), or {IGNORE} for a row that is not scored"
            )
    for rank, row in enumerate(table):
        pairs = zip(SHARED, row[FIRST_SHARED:], table[0][FIRST_SHARED:], strict=True)
        differing = [name for name, theirs, first in pairs if theirs != first]
        if differing:
            raise ValueError(
                f"ranks 0 and {rank} of the group differ in {', '.join(differing)}; every rank "
                "must pass the same hidden rows, targets and options, and its own rows of the head"
            )
    spans = [(row[START], row[END]) for row in table]
    place = 0
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        place = end if start == place else -1
    if place != vocab:
        raise ValueError(
            f"the shards [vocab_start, vocab_start + rows) of the ranks are {spans}: expected that "
            f"they cover [0, {vocab}) without gap or overlap (padded rows cut off)"
        )


def refuse(group: Group, device: torch.device) -> None:
    """Tell the ranks that wait in `agree` that this one raises."""
    group.all_gather(torch.zeros(ROW_WORDS, dtype=torch.int64, device=device))


def _row(terms: Terms) -> Tensor:
    (rows, width), targets = terms.hidden.shape, terms.targets
    start = terms.vocab_start
    ours = [1, start, start + terms.weight.shape[0]]
    shared = [rows, width, terms.vocab_size, *map(_bits, terms.options)]
    words = targets.new_empty(ROW_WORDS)
    words[:NUM_BAD] = targets.new_tensor(ours)
    words[FIRST_SHARED:-1] = targets.new_tensor(shared)
    bad = (targets != IGNORE) & ((targets < 0) | (targets >= terms.vocab_size))
    words[NUM_BAD] = bad.sum()
    row = bad.to(torch.int8).argmax() if rows else targets.new_zeros(())
    words[BAD_ROW] = row
    words[BAD_TARGET] = targets.index_select(0, row.view(1)).squeeze(0) if rows else row
    # wraps around; equal targets give equal sums, unequal ones almost never
    place = torch.arange(1, rows + 1, device=targets.device)
    words[-1] = (targets * (place * 0x9E3779B97F4A7C1)).sum()
    return words


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]
