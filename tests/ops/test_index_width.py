"""The proof that offsets fit: planted kernels, mutants of ours, and the arithmetic of ranges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from bench.static.index_width import prove_offsets
from bench.static.integer_range import ARITHMETIC, Range, fitted, joined, type_bounds, widened
from tests.ops.offset_kernels import MUTATED, PLANTED

ROOT = Path(__file__).parents[2]
EXACT: dict[str, Callable[[int, int], int]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: int(x / y),
    "floordiv": lambda x, y: x // y,
    "ceildiv": lambda x, y: -(-x // y),
    "rem": lambda x, y: x - y * int(x / y),
    "min": min,
    "max": max,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "shl": lambda x, y: x << y,
    "shr": lambda x, y: x >> y,
}


@pytest.fixture(scope="module")
def faults() -> dict[str, list[str]]:
    """What is found in kernels compiled for sm_90, by name."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offset_kernels.py"))],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", PLANTED)
def test_planted_kernels(name: str, faults: dict[str, list[str]]) -> None:
    _, _, fits = PLANTED[name]
    assert (faults[name] == []) == fits, faults[name]


@pytest.mark.parametrize("name", MUTATED)
def test_our_kernels_without_their_64_bits(name: str, faults: dict[str, list[str]]) -> None:
    assert any("i32 would have to hold" in fault for fault in faults[name])


def test_attention_with_the_most_heads(faults: dict[str, list[str]]) -> None:
    assert faults["most heads"] == []


def test_a_fault_names_its_line_its_size_and_what_lacks_a_limit(
    faults: dict[str, list[str]],
) -> None:
    (fault,) = faults["a product at no limit"]
    assert "offset_kernels.py:" in fault and "i32 would have to hold 4,611,686," in fault
    assert fault.endswith("(no limit is stated for stride)")


@pytest.mark.parametrize("name", ARITHMETIC)
def test_bounds_hold_every_result(name: str) -> None:
    """All pairs of small ranges."""
    operation = name.removeprefix("arith.").removesuffix("i").removesuffix("s").removesuffix("u")
    exact = EXACT[operation]
    lows = range(0 if name.endswith("ui") or operation == "sh" else -5, 5)
    ranges = [(low, high) for low in lows for high in range(low, 5)]
    for a, b in product(ranges, ranges):
        found = [
            exact(x, y)
            for x in range(a[0], a[1] + 1)
            for y in range(b[0], b[1] + 1)
            if not ("div" in operation or operation == "rem") or y
            if not operation.startswith("sh") or y >= 0
        ]
        if not found:
            continue
        low, high = ARITHMETIC[name](Range(*a), Range(*b))
        assert low <= min(found) and max(found) <= high, (a, b)
        if operation in ("add", "sub", "mul", "min", "max"):
            assert (low, high) == (min(found), max(found))


def test_what_does_not_fit_marks_all_that_rests_on_it() -> None:
    largest = (1 << 31) - 1
    assert fitted(0, largest, "i32", "here").wraps == frozenset()
    wrapped = fitted(0, largest + 1, "i32", "here")
    assert (wrapped.low, wrapped.high) == type_bounds("i32")
    assert wrapped.wraps == {"here: i32 would have to hold 2,147,483,648"}
    wide = fitted(0, 5, "i64", "there", wrapped, Range(0, 1))
    assert wide.wraps == wrapped.wraps == joined(Range(7, 8), wide).wraps


def test_widening_ends() -> None:
    grown = widened(Range(0, 5), Range(1, 6))
    assert (grown.low, grown.high) == (0, (1 << 31) - 1)
    assert widened(grown, Range(-1, 1 << 40)) == Range(-(1 << 31), (1 << 63) - 1)


CONTROL_FLOW = """
module {
  tt.func public @kernel(%ptr: !tt.ptr<f32> loc("ptr"(#loc)), %n: i32 loc("n"(#loc))) {
    %zero = arith.constant 0 : i32 loc(#loc)
    %zeros = arith.constant 0.000000e+00 : f32 loc(#loc)
    cf.cond_br %flag, ^bb1(%n : i32), ^bb1(%zero : i32) loc(#loc)
  ^bb1(%carried: i32 loc("x"(#loc))):  // 2 preds: ^bb0, ^bb0
    %1 = tt.addptr %ptr, %carried : !tt.ptr<f32>, i32 loc(#loc1)
    tt.store %1, %zeros : !tt.ptr<f32> loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
#loc1 = loc("/folder/kernel.py":7:1)
"""


def test_what_jumps_carry_is_not_trusted() -> None:
    text = CONTROL_FLOW.replace("%flag", "%n")
    found = prove_offsets(text, {"n": 3})
    assert found[:2] == (0, 0)
    assert found.unproved == (
        "offset at kernel.py:7 rests on an unknown line: %carried is carried by a jump",
    )
