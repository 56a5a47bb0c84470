"""What a row of the registry is: a kernel, the launches to compile, and what each of them costs.

A launch hands meta tensors to the host code that owns the kernel, or, where that reads data, calls
the kernel as it does: nothing here allocates or computes. Whoever reads the table decides what a
launch does; `bench.static` compiles it. What a launch costs is counted from its own arguments:

    flops   of the tensor cores, over visible pairs: not the masked parts of blocks, nor head sizes
            padded to a power of two
    bytes   every argument read or written once: what no cache can save
    items   logits, visible pairs or elements, to compare launches of different sizes by

Shapes: M rows, n columns of a tile of logits, H hidden, V vocabulary; Hq and Hk heads, N tokens, D
head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "EVERYTHING",
    "MAX_HIDDEN",
    "MAX_ROWS",
    "MAX_TOKENS",
    "MAX_VOCAB",
    "ROWS",
    "TILE",
    "VOCABS",
    "WIDTHS",
    "Arguments",
    "Case",
    "Cost",
    "Kernel",
    "anywhere",
    "by",
    "floats",
    "meta",
    "target_ids",
]

WIDTHS = (4096, 5120, 8192)
VOCABS = (128_256, 151_936)
ROWS = 8192
TILE = 4096  # rows and columns of logits that the planner chooses at all of these shapes
# The sizes up to which offsets are proved (`bench.static.index_width`).
MAX_ROWS = MAX_TOKENS = 1 << 22
MAX_HIDDEN = 1 << 14
MAX_VOCAB = 1 << 19
EVERYTHING = "every option"

Arguments = Mapping[str, Any]


class Cost(NamedTuple):
    flops: int
    bytes: int
    items: int


class Case(NamedTuple):
    """One launch at one shape; `launch` gets the GPU's capability: 90 for 9.0, -1 for AMD."""

    shape: str
    launch: Callable[[int], object]


class Kernel(NamedTuple):
    op: str
    package: str  # the distribution that brings it
    source: str  # module:function
    is_gemm: bool  # else it is bound by memory
    cost: Callable[[Arguments], Cost]
    cases: tuple[Case, ...]  # one shape comes first, of ours without and with every option
    peers: tuple[str, ...] = ()  # sources of kernels that do the same work
    # Largest value of an integer argument, of the integers behind a pointer, of `program_id(0)`;
    # what is not named may have any value of its type.
    limits: Mapping[str, int] = {}

    @property
    def name(self) -> str:
        return self.source.partition(":")[2]

    def load(self) -> Any:
        """The jit function; raises ImportError if its package is not installed."""
        module, _, function = self.source.partition(":")
        return getattr(importlib.import_module(module), function)


def anywhere(run: Callable[..., object], *args: Any) -> Callable[[int], object]:
    """A launch that is the same for every GPU."""
    return lambda _: run(*args)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def floats(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.float32)


def target_ids(rows: int) -> Tensor:
    return meta(rows, dtype=torch.int64)


def by(
    values: tuple[int, ...], letter: str, launch: Callable[[int], Callable[[int], object]]
) -> tuple[Case, ...]:
    return tuple(Case(f"{letter} {value}", launch(value)) for value in values)
