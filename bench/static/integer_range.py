"""Ranges of the integers in a kernel, and whether arithmetic on them can pass its own width.

Bounds are Python's integers, so they are exact. Where the exact result of an operation does not fit
its type, `wraps` says so, and every value computed from it inherits that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

__all__ = ["ARITHMETIC", "Range", "anything", "fitted", "joined", "type_bounds", "widened"]

_POWERS = (31, 63)


@dataclass(frozen=True)
class Range:
    """Every integer from `low` to `high`."""

    low: int
    high: int
    wraps: frozenset[str] = frozenset()  # where a value that this one rests on may have wrapped
    unlimited: frozenset[str] = frozenset()  # arguments without a limit that it rests on


def type_bounds(kind: str) -> tuple[int, int] | None:
    """Smallest and largest value of "i32", say; None if that is no integer type."""
    width = {"index": "64"}.get(kind, kind.removeprefix("i"))
    if not width.isdigit() or kind == width:
        return None
    if width == "1":
        return 0, 1
    return -(1 << (int(width) - 1)), (1 << (int(width) - 1)) - 1


def anything(kind: str, operands: Iterable[Range] = (), wraps: str = "") -> Range:
    """Every value of an integer type, computed from `operands` or not."""
    bounds = type_bounds(kind)
    assert bounds is not None, kind
    return _from(operands, *bounds, wraps)


def fitted(low: int, high: int, kind: str, place: str, *operands: Range) -> Range:
    """The exact result of `operands` in a type: if it does not fit, every value, and a note."""
    bounds = type_bounds(kind)
    assert bounds is not None, kind
    if bounds[0] <= low and high <= bounds[1]:
        return _from(operands, low, high)
    reached = high if high > bounds[1] else low
    return _from(operands, *bounds, f"{place}: {kind} would have to hold {reached:,}")


def joined(*ranges: Range) -> Range:
    """Whatever one of them holds."""
    return _from(ranges, min(r.low for r in ranges), max(r.high for r in ranges))


def widened(old: Range, new: Range) -> Range:
    """Of a value that a loop changes: what grew is as large as its type allows, so that it ends."""
    both = joined(old, new)
    low = max(x for x in (0, *(-(1 << n) for n in _POWERS)) if x <= both.low)
    high = min(x for x in ((1 << n) - 1 for n in _POWERS) if x >= both.high)
    low = old.low if both.low == old.low else low
    return _from((both,), low, old.high if both.high == old.high else high)


def _from(operands: Iterable[Range], low: int, high: int, wraps: str = "") -> Range:
    operands = tuple(operands)
    notes = frozenset({wraps} if wraps else ()).union(*(r.wraps for r in operands))
    return Range(low, high, notes, frozenset().union(*(r.unlimited for r in operands)))


Bounds = Callable[[Range, Range], tuple[int, int]]


def _corners(operation: Callable[[int, int], int]) -> Bounds:
    """Of an operation that is monotonic in each operand."""

    def bounds(a: Range, b: Range) -> tuple[int, int]:
        found = [operation(x, y) for x, y in product((a.low, a.high), (b.low, b.high))]
        return min(found), max(found)

    return bounds


def _quotient(divide: Callable[[int, int], int]) -> Bounds:
    """By anything but zero, which is undefined; divisors next to zero give the largest results."""

    def bounds(a: Range, b: Range) -> tuple[int, int]:
        divisors = {x for x in (b.low, b.high, -1, 1) if b.low <= x <= b.high and x} or {1}
        found = [divide(x, y) for x, y in product((a.low, a.high), divisors)]
        return min(found), max(found)

    return bounds


def _toward_zero(a: int, b: int) -> int:
    """Division as GPUs do it."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: Range, b: Range) -> tuple[int, int]:
    """With the sign of the dividend."""
    largest = max(abs(b.low), abs(b.high), 1) - 1
    return max(min(a.low, 0), -largest), min(max(a.high, 0), largest)


def _and(a: Range, b: Range) -> tuple[int, int]:
    masks = [r.high for r in (a, b) if r.low >= 0]
    return (0, min(masks)) if masks else (-1 << max(_bits(a), _bits(b)), max(a.high, b.high))


def _or(a: Range, b: Range) -> tuple[int, int]:
    bits = max(_bits(a), _bits(b))
    return (0 if min(a.low, b.low) >= 0 else -1 << bits), (1 << bits) - 1


def _bits(a: Range) -> int:
    return max(x.bit_length() if x >= 0 else (~x).bit_length() for x in (a.low, a.high))


def _by_power(shift: Callable[[int, int], int]) -> Bounds:
    return _corners(lambda x, count: shift(x, min(max(count, 0), 64)))


# The bounds of the exact result of a signed operation.
ARITHMETIC: dict[str, Bounds] = {
    "arith.addi": lambda a, b: (a.low + b.low, a.high + b.high),
    "arith.subi": lambda a, b: (a.low - b.high, a.high - b.low),
    "arith.muli": _corners(lambda x, y: x * y),
    "arith.divsi": _quotient(_toward_zero),
    "arith.floordivsi": _quotient(lambda x, y: x // y),
    "arith.ceildivsi": _quotient(lambda x, y: -(-x // y)),
    "arith.remsi": _remainder,
    "arith.minsi": lambda a, b: (min(a.low, b.low), min(a.high, b.high)),
    "arith.maxsi": lambda a, b: (max(a.low, b.low), max(a.high, b.high)),
    "arith.andi": _and,
    "arith.ori": _or,
    "arith.xori": _or,
    "arith.shli": _by_power(lambda x, count: x << count),
    "arith.shrsi": _by_power(lambda x, count: x >> count),
}
# Unsigned operations are these as long as no operand is negative.
ARITHMETIC |= {
    name.replace("si", "ui"): bounds for name, bounds in ARITHMETIC.items() if name.endswith("si")
}
