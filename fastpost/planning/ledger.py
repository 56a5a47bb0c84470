"""Bytes of living tensors over time, and who holds them at the peak.

Every storage is one entry with a category. Entries are written when a storage is made, resized or
freed; the category is read only at the end, so a tensor may be named after its birth (a gradient is
an ordinary tensor until the parameter takes it).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

PARAMETERS = "parameters"
BUFFERS = "buffers"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
ACTIVATIONS = "activations"
HEAD_WORKSPACE = "head workspace"
KERNEL_WORKSPACE = "kernel workspace"
REFERENCE = "reference"
COMMUNICATION = "all-gather buffers"
ROLLOUT_COPY = "rollout copy"
ROLLOUT_CACHE = "rollout cache"
HOST = "host memory"  # not of the GPU: in no sum

CATEGORIES = (
    PARAMETERS,
    BUFFERS,
    GRADIENTS,
    OPTIMIZER,
    ACTIVATIONS,
    HEAD_WORKSPACE,
    KERNEL_WORKSPACE,
    REFERENCE,
    COMMUNICATION,
    ROLLOUT_COPY,
    ROLLOUT_CACHE,
)


class Moment(NamedTuple):
    """When something happened: a part of a step, a region of the model, an operator."""

    phase: str
    region: str
    operator: str

    def __str__(self) -> str:
        return ", ".join(part for part in self if part)


class Window(NamedTuple):
    """A stretch of a step: the `visit`-th time, from 1, that a phase is in a region.

    A reference's forward and the policy's visit the same regions, and what both hold for each layer
    of the model differs: one peak for both could not be composed.
    """

    phase: str
    region: str
    visit: int


@dataclass(frozen=True)
class Peak:
    """The moment of most bytes.

    Attributes:
        held: category -> bytes.
        moment: what ran.
    """

    held: dict[str, int]
    moment: Moment

    @property
    def total(self) -> int:
        """Bytes of living storages."""
        return sum(self.held.values())


class Ledger:
    """Entries of bytes. An account is one storage, or the inside of one operator."""

    def __init__(self) -> None:
        self._category: list[str] = []
        self._bytes: list[int] = []
        self._entries: list[tuple[int, int, Moment]] = []  # account, change of bytes, when

    def open(self, size: int, category: str, moment: Moment) -> int:
        """A new account of `size` bytes; returns its number."""
        account = len(self._bytes)
        self._category.append(category)
        self._bytes.append(0)
        self.resize(account, size, moment)
        return account

    def resize(self, account: int, size: int, moment: Moment) -> None:
        """The account holds `size` bytes from now on; 0 closes it."""
        change = size - self._bytes[account]
        if change:
            self._bytes[account] = size
            self._entries.append((account, change, moment))

    def name(self, account: int, category: str) -> None:
        """Says what an account is, also for the time before."""
        self._category[account] = category

    def now(self) -> int:
        """The number of entries so far, to be given to `peaks`."""
        return len(self._entries)

    def held(self) -> dict[str, int]:
        """Category -> living bytes at the end, of the GPU."""
        found: Counter[str] = Counter()
        for category, size in zip(self._category, self._bytes, strict=True):
            found[category] += size
        return _ordered(found)

    def peaks(self, since: int = 0) -> dict[Window, Peak]:
        """The peak of each window, from entry `since` on."""
        total, highest = 0, dict[Window, tuple[int, int]]()
        visits: Counter[tuple[str, str]] = Counter()
        here = None
        for i, (account, change, moment) in enumerate(self._entries):
            if self._category[account] == HOST:
                continue
            total += change
            if i < since:
                continue
            if here != (here := moment[:2]):
                visits[here] += 1
            window = Window(*here, visits[here])
            if total > highest.get(window, (-1, 0))[0]:
                highest[window] = total, i
        windows = {i: window for window, (_, i) in highest.items()}
        held: Counter[str] = Counter()
        found = {}
        for i, (account, change, moment) in enumerate(self._entries):
            held[self._category[account]] += change
            if i in windows:
                found[windows[i]] = Peak(_ordered(held), moment)
        return found

    def most(self, category: str) -> int:
        """Most living bytes of one category at any time."""
        total = most = 0
        for account, change, _ in self._entries:
            if self._category[account] == category:
                total += change
                most = max(most, total)
        return most


def _ordered(held: Counter[str]) -> dict[str, int]:
    return {category: held[category] for category in CATEGORIES if held[category]}
