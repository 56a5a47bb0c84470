"""Proves of a compiled kernel that no offset it adds to a pointer was computed in too few bits.

Triton adds offsets of 32 or 64 bits to pointers of 64. Past 2^31 elements an offset of 32 bits is
another address, and so is one of 64 that was widened after a product that did not fit. The proof
walks Triton's IR with ranges (`integer_range`): every offset of a `tt.addptr`, and every coordinate
of a tensor descriptor, must rest on arithmetic that fits its type for all values of

    integer arguments    up to their limit in the registry's row, else all of their type
    integers in memory   up to the limit of the pointer they are loaded through, else all
    program ids          below the largest grid of CUDA, or up to a limit named `program_id(0)`

An argument past 2^31 is an i64 of another compilation, where the arithmetic is wider: what holds
for 32 bits holds there. Masks are not used, so the offsets of masked elements must fit as well.
What is not understood counts as every value of its type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bench.static.integer_range import (
    ARITHMETIC,
    Range,
    anything,
    fitted,
    joined,
    type_bounds,
    widened,
)
from bench.static.triton_ir import Operation, element_type, parse

__all__ = ["Offsets", "prove_offsets"]

GRID = ((1 << 31) - 1, 65_535, 65_535)
LOOP = re.compile(
    r"scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)(?: iter_args\((.*?)\))?"
)
CARRIED = re.compile(r"(%\S+) = (%[^\s,)]+)")
INTEGER = re.compile(r"arith\.constant (?:dense<)?(-?\d+)\b(?!\.)")
POINTEE = re.compile(r"!tt\.ptr<(\w+)>")
SHAPE = re.compile(r"tensor<((?:\d+x)+)")
SAME_ELEMENTS = {
    "tt.splat", "tt.unsplat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans",
    "tt.split", "arith.index_cast",
}  # fmt: skip
SAME_POINTER = {"tt.addptr", "tt.advance", "tt.make_tensor_descriptor"}
EXTREMES = {"arith.minsi", "arith.maxsi", "arith.minui", "arith.maxui"}


class Offsets(NamedTuple):
    """How many offsets are proved, by their width, and what may be wrong with the others."""

    wide: int  # of 64 bits
    bounded: int  # of 32 bits, which suffice
    unproved: tuple[str, ...]


Pointer = frozenset[str]  # names of the arguments that it may come from
Value = Range | Pointer | None  # None: of floats


def prove_offsets(ttir: str, limits: Mapping[str, int]) -> Offsets:
    """Of the text of a kernel in Triton's IR.

    Args:
        ttir: `compiled.asm["ttir"]`.
        limits: the largest value of an integer argument, of the integers behind a pointer argument,
            or of a program id. None of them is negative.
    """
    functions = [operation for operation in parse(ttir) if operation.name == "tt.func"]
    verdicts = [v for f in functions for v in _Proof(f, limits).verdicts.values()]
    faults = {v for v in verdicts if v not in ("wide", "bounded")}
    return Offsets(verdicts.count("wide"), verdicts.count("bounded"), tuple(sorted(faults)))


class _Proof:
    """A walk through one function; `verdicts` are those of the last, widest visit of a loop."""

    def __init__(self, function: Operation, limits: Mapping[str, int]) -> None:
        self.limits = limits
        self.verdicts: dict[tuple[int, int], str] = {}
        self.values: dict[str, Value] = {}
        for name, kind in function.arguments:
            self.values[name] = self._argument(name[1:], kind)
            if " public " not in function.text:
                self.values[name] = _unknown(kind, f"{name}: passed to a function not inlined")
        for region in function.regions:
            self._walk(region)

    def _argument(self, name: str, kind: str) -> Value:
        if kind.startswith("!tt."):
            return Pointer({name})
        return self._limited(name, kind) if type_bounds(kind) else None

    def _limited(self, name: str, kind: str) -> Range:
        if name in self.limits:
            return Range(0, self.limits[name])
        free = anything(kind)
        return Range(free.low, free.high, unlimited=frozenset({name}))

    def _walk(self, region: Sequence[Operation]) -> list[Value]:
        """Returns what the region yields."""
        yielded: list[Value] = []
        for operation in region:
            if operation.name in ("scf.yield", "scf.condition"):
                given = operation.operands[operation.name == "scf.condition" :]
                yielded = [self.values[name] for name in given]
            elif operation.name == "block":
                for name, kind in operation.arguments:
                    note = f"{operation.place}: {name} is carried by a jump"
                    self.values[name] = _unknown(kind, note)
            else:
                results = self._results(operation)
                self.values.update(zip(operation.results, results, strict=True))
        return yielded

    def _results(self, operation: Operation) -> Sequence[Value]:
        if operation.name == "scf.for":
            return self._for_loop(operation)
        if operation.name == "scf.while":
            return self._while_loop(operation)
        if operation.name == "scf.if":
            branches = [self._walk(region) for region in operation.regions]
            return [_union(*values) for values in zip(*branches, strict=True)]
        if operation.name in ("tt.reduce", "tt.scan"):
            return self._reduction(operation)
        operands = [self.values[name] for name in operation.operands]
        self._judge(operation, operands)
        count = len(operation.results)
        return [self._result(operation, operands)] * count if count else ()

    def _result(self, operation: Operation, operands: list[Value]) -> Value:
        name, kind = operation.name, element_type(operation.type)
        if name in SAME_POINTER:
            return operands[0]
        if name == "tt.load" or name.startswith("tt.atomic"):
            return self._loaded(operation, operands)
        if name == "arith.cmpi":
            return Range(0, 1)
        if name == "arith.select":
            return _union(*operands[1:])
        if name in SAME_ELEMENTS or name in ("tt.join", "tt.cat"):
            return _union(*operands)
        bounds = type_bounds(kind)
        if bounds is None:
            return Pointer() if kind == "ptr" else None
        if name == "arith.constant" and (found := INTEGER.match(operation.text)):
            return Range(int(found[1]), int(found[1]))
        if name == "tt.make_range":
            ends = dict(re.findall(r"(start|end) = (\d+)", operation.text))
            return Range(int(ends["start"]), int(ends["end"]) - 1)
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            axis = "xyz".index(operation.text.partition(" : ")[0][-1])
            largest = self.limits.get(f"program_id({axis})", GRID[axis] - 1)
            return Range(0, largest + (name == "tt.get_num_programs"))
        return _computed(operation, kind, [x for x in operands if isinstance(x, Range)])

    def _loaded(self, operation: Operation, operands: list[Value]) -> Value:
        """Integers behind a pointer; where it may be one of several, the largest limit."""
        pointee = POINTEE.search(operation.text)
        pointer = next((x for x in operands if isinstance(x, frozenset)), Pointer())
        if pointee is None or type_bounds(pointee[1]) is None:
            return None
        found = [self._limited(name, pointee[1]) for name in sorted(pointer)]
        return joined(*found) if found else anything(pointee[1])

    def _for_loop(self, operation: Operation) -> Sequence[Value]:
        found = LOOP.match(operation.text)
        assert found is not None, operation.text
        start, end, step = (self.values[name] for name in found.group(2, 3, 4))
        assert isinstance(start, Range) and isinstance(end, Range) and isinstance(step, Range)
        kind = operation.type if type_bounds(operation.type) else "index"
        last = max(start.low, end.high - 1)
        # The loop ends by an addition that passes the end, which must not wrap to below it.
        passed = fitted(start.low, last + step.high, kind, operation.place, start, end, step)
        self.values[found[1]] = Range(start.low, last, passed.wraps, passed.unlimited)
        trips = max(0, -(-(end.high - start.low) // max(1, step.low)))
        return self._repeat(operation.regions[0], CARRIED.findall(found[5] or ""), trips)

    def _while_loop(self, operation: Operation) -> Sequence[Value]:
        carried = CARRIED.findall(operation.text.partition("(")[2].partition(")")[0])
        before, after = operation.regions
        names = [name for name, _ in after[0].arguments] if after[0].name == "block" else []
        given = [self.values[name] for _, name in carried]
        while True:
            self.values.update(zip([name for name, _ in carried], given, strict=True))
            passed = self._walk(before)
            self.values.update(zip(names, passed, strict=True))
            again = self._walk(after[1:] if names else after)
            if all(_union(old, new) == old for old, new in zip(given, again, strict=True)):
                return passed
            given = [_widened(old, new) for old, new in zip(given, again, strict=True)]

    def _repeat(
        self, body: list[Operation], carried: list[tuple[str, str]], trips: int
    ) -> list[Value]:
        """What a loop carries: before, between and after its trips, all in one."""
        names = [name for name, _ in carried]
        first = [self.values[name] for _, name in carried]
        ends = body[-1].operands if carried else ()
        given = first
        grow: Callable[[Value, Value], Value] = _union
        while True:
            self.values.update(zip(names, given, strict=True))
            yielded = self._walk(body)
            after = [
                self._sum(before, name, end, body, trips) or new
                for before, name, end, new in zip(first, names, ends, yielded, strict=True)
            ]
            if all(_union(old, new) == old for old, new in zip(given, after, strict=True)):
                return given
            given = [grow(old, new) for old, new in zip(given, after, strict=True)]
            grow = _widened

    def _sum(
        self, first: Value, name: str, result: str, body: list[Operation], trips: int
    ) -> Range | None:
        """Of a carried value to which each trip adds something, else None."""
        made = next((x for x in body if result in x.results), None)
        if made is None or made.name != "arith.addi" or name not in made.operands:
            return None
        step = self.values[made.operands[made.operands[0] == name]]
        if not (isinstance(first, Range) and isinstance(step, Range)):
            return None
        low, high = first.low + trips * min(0, step.low), first.high + trips * max(0, step.high)
        return fitted(low, high, element_type(made.type), made.place, first, step)

    def _reduction(self, operation: Operation) -> list[Value]:
        """Sums are at most an element as often as there are any; of extremes each is an element."""
        operands = [self.values[name] for name in operation.operands]
        body = {x.name for x in operation.regions[0]} & ARITHMETIC.keys() - EXTREMES
        sizes = [math.prod(map(int, x[:-1].split("x"))) for x in SHAPE.findall(operation.text)]
        kind = element_type(operation.type)
        results: list[Value] = []
        for operand in operands:
            if not isinstance(operand, Range) or not body:
                results.append(operand)
            elif body == {"arith.addi"} and len(operands) == 1:
                low, high = min(0, operand.low) * max(sizes), max(0, operand.high) * max(sizes)
                results.append(fitted(low, high, kind, operation.place, operand))
            else:
                note = f"{operation.place}: a reduction that is not understood"
                results.append(Range(operand.low, operand.high, operand.wraps | {note}))
        return results

    def _judge(self, operation: Operation, operands: list[Value]) -> None:
        if operation.name not in SAME_POINTER and not operation.name.startswith("tt.descriptor_"):
            return
        width = "wide" if operation.type.rstrip(">").endswith("i64") else "bounded"
        for index, offset in enumerate(operands[1:]):
            if isinstance(offset, Range):
                fault = f"offset at {operation.place} rests on {_reasons(offset)}"
                self.verdicts[id(operation), index] = fault if offset.wraps else width
            elif operation.name == "tt.addptr":
                fault = f"offset at {operation.place} is not understood"
                self.verdicts[id(operation), index] = fault


def _reasons(offset: Range) -> str:
    reasons = "; ".join(sorted(offset.wraps))
    if offset.unlimited:
        reasons += f" (no limit is stated for {', '.join(sorted(offset.unlimited))})"
    return reasons


def _unknown(kind: str, note: str) -> Value:
    element = element_type(kind)
    if element == "ptr":
        return Pointer()
    return anything(element, wraps=note) if type_bounds(element) else None


def _union(*values: Value) -> Value:
    ranges = [x for x in values if isinstance(x, Range)]
    if len(ranges) == len(values):
        return joined(*ranges)
    pointers = [x for x in values if isinstance(x, frozenset)]
    return Pointer().union(*pointers) if len(pointers) == len(values) else None


def _widened(old: Value, new: Value) -> Value:
    if isinstance(old, Range) and isinstance(new, Range):
        return widened(old, new)
    return _union(old, new)


def _computed(operation: Operation, kind: str, operands: list[Range]) -> Range:
    """Of arithmetic."""
    name = operation.name
    if name in ("arith.extsi", "arith.extui", "arith.trunci") and operands:
        source = element_type(operation.text.rpartition(" : ")[2].partition(" to ")[0])
        low, high = operands[0].low, operands[0].high
        if source == "i1" and name == "arith.extsi":
            low, high = -high, -low
        if name != "arith.extui" or low >= 0:
            return fitted(low, high, kind, operation.place, *operands)
    elif name in ARITHMETIC and len(operands) == 2:
        is_negative = min(r.low for r in operands) < 0
        if not (name.endswith("ui") and is_negative):
            low, high = ARITHMETIC[name](*operands)
            return fitted(low, high, kind, operation.place, *operands)
    return anything(kind, operands)
