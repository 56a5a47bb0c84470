"""Kernels whose offsets fit 32 bits, or do not; `python offset_kernels.py` judges them all.

Compiled in a process of its own: in that of the tests Triton interprets. Prints JSON: for each name
the faults that `bench.static.index_width` finds in the kernel at those limits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import json
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl

from bench import registry
from bench.static import kernels_attention
from bench.static.compilation import compile_launches, compiler_cache
from bench.static.index_width import prove_offsets
from bench.static.kernel_row import floats, meta
from bench.static.processors import PROCESSORS

BLOCK = tl.constexpr(1024)
BITS = tl.constexpr(10)


@triton.jit
def product(ptr, table_ptr, stride, n):
    tl.store(ptr + tl.program_id(0) * stride + tl.arange(0, BLOCK), 0.0)


@triton.jit
def wide_product(ptr, table_ptr, stride, n):
    tl.store(ptr + tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK), 0.0)


@triton.jit
def product_widened_too_late(ptr, table_ptr, stride, n):
    tl.store(ptr + (tl.program_id(0) * stride).to(tl.int64) + tl.arange(0, BLOCK), 0.0)


@triton.jit
def block(ptr, table_ptr, stride, n):
    tl.store(ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 0.0)


@triton.jit
def shifted_block(ptr, table_ptr, stride, n):
    tl.store(ptr + ((tl.program_id(0) << BITS) | tl.arange(0, BLOCK)), 0.0)


@triton.jit
def loop(ptr, table_ptr, stride, n):
    for index in range(n):
        tl.store(ptr + index * stride, 0.0)


@triton.jit
def sum_in_a_loop(ptr, table_ptr, stride, n):
    offset = tl.program_id(0)
    for _ in range(n):
        tl.store(ptr + offset, 0.0)
        offset += stride


@triton.jit
def doubled_in_a_loop(ptr, table_ptr, stride, n):
    offset = tl.program_id(0)
    for _ in range(n):
        tl.store(ptr + offset, 0.0)
        offset *= 2


@triton.jit
def while_loop(ptr, table_ptr, stride, n):
    index = 0
    while index < n:
        tl.store(ptr + index * stride, 0.0)
        index += 1


@triton.jit
def branch(ptr, table_ptr, stride, n):
    offset = tl.program_id(0)
    if n > 7:
        offset = offset * stride
    tl.store(ptr + offset, 0.0)


@triton.jit
def loaded(ptr, table_ptr, stride, n):
    tl.store(ptr + tl.load(table_ptr + tl.program_id(0)) * stride, 0.0)


@triton.jit
def wide_loaded(ptr, table_ptr, stride, n):
    tl.store(ptr + tl.load(table_ptr + tl.program_id(0)).to(tl.int64) * stride, 0.0)


@triton.jit
def clamped(ptr, table_ptr, stride, n):
    row = tl.minimum(tl.maximum(tl.load(table_ptr + tl.program_id(0)), 0), 1023)
    tl.store(ptr + row * (stride % 4096), 0.0)


@triton.jit
def summed_lengths(ptr, table_ptr, stride, n):
    tl.store(ptr + tl.sum(tl.load(table_ptr + tl.arange(0, BLOCK)), 0), 0.0)


@triton.jit
def coordinate(ptr, table_ptr, stride, n):
    rows = tl.make_tensor_descriptor(ptr, [n, 64], [64, 1], [16, 64])
    rows.store([tl.program_id(0) * stride, 0], tl.zeros([16, 64], tl.float32))


MILLION = 1 << 20
# name: kernel, limits, and whether its offsets fit
PLANTED = {
    "a product at no limit": (product, {}, False),
    "a product at the limits": (product, {"program_id(0)": MILLION, "stride": 1 << 14}, False),
    "a small product": (product, {"program_id(0)": MILLION, "stride": 2000}, True),
    "a wide product": (wide_product, {}, True),
    "a product widened too late": (product_widened_too_late, {}, False),
    "the last offset is 2^31 - 1": (block, {"program_id(0)": (1 << 21) - 1}, True),
    "the last offset is 2^31 + 1023": (block, {"program_id(0)": 1 << 21}, False),
    "a small shift": (shifted_block, {"program_id(0)": (1 << 21) - 1}, True),
    "a shift": (shifted_block, {"program_id(0)": 1 << 21}, False),
    "a loop": (loop, {"n": MILLION, "stride": 1 << 12}, False),
    "a short loop": (loop, {"n": 1000, "stride": 1 << 12}, True),
    "a sum in a loop": (sum_in_a_loop, {"program_id(0)": 9, "n": MILLION, "stride": 4096}, False),
    "a sum in a short loop": (
        sum_in_a_loop, {"program_id(0)": 9, "n": 1000, "stride": 4096}, True,
    ),
    "doubled in a loop": (doubled_in_a_loop, {"program_id(0)": 9, "n": 1000}, False),
    "a while loop": (while_loop, {"n": 1000, "stride": 1 << 12}, False),  # not understood
    "a branch": (branch, {"program_id(0)": MILLION, "stride": 1 << 12}, False),
    "a small branch": (branch, {"program_id(0)": 1000, "stride": 1 << 12}, True),
    "a loaded row": (loaded, {"stride": 1 << 12}, False),
    "a loaded row below a limit": (loaded, {"table_ptr": 1000, "stride": 1 << 12}, True),
    "a wide loaded row": (wide_loaded, {}, True),
    "a clamped row": (clamped, {}, True),
    "a sum of lengths": (summed_lengths, {"table_ptr": 1 << 22}, False),
    "a sum of short lengths": (summed_lengths, {"table_ptr": 1 << 20}, True),
    "a coordinate": (coordinate, {"program_id(0)": MILLION, "stride": 1 << 14}, False),
    "a small coordinate": (coordinate, {"program_id(0)": 1000, "stride": 1 << 14}, True),
}  # fmt: skip
# Kernels of ours that widen their row; the mutants do not.
MUTATED = ("_linear_logprob_gradient_kernel", "_linear_logprob_rescale_kernel")


def planted_faults(name: str) -> tuple[str, ...]:
    kernel, limits, _ = PLANTED[name]
    table = meta(16, dtype=torch.int32)

    def launch() -> None:
        kernel[(1,)](floats(64, 64), table, 4099, 4097)

    (compiled,) = compile_launches(launch, kernel, PROCESSORS["sm_90"].target())
    return prove_offsets(compiled.compiled.asm["ttir"], limits).unproved


def mutant_faults(name: str) -> tuple[str, ...]:
    """Of a kernel of ours without its conversions to 64 bits."""
    row = next(kernel for kernel in registry.KERNELS if kernel.name == name)
    function = row.load()
    assert ".to(tl.int64)" in function.src
    function._unsafe_update_src(function.src.replace(".to(tl.int64)", ""))
    launches = compile_launches(
        lambda: row.cases[0].launch(90), function, PROCESSORS["sm_90"].target()
    )
    return prove_offsets(launches[0].compiled.asm["ttir"], row.limits).unproved


def most_heads_faults() -> tuple[str, ...]:
    """Of the attention kernel whose loop counts heads and rows in one, at 2^8 heads to one."""
    name = "prefix_attention_bwd_key_kernel"
    row = next(kernel for kernel in registry.KERNELS if kernel.name == name)
    with (
        mock.patch.object(kernels_attention, "QUERY_HEADS", 256),
        mock.patch.object(kernels_attention, "KEY_HEADS", 1),
    ):
        launches = compile_launches(
            lambda: row.cases[0].launch(90), row.load(), PROCESSORS["sm_90"].target()
        )
    assert launches[0].arguments["GROUPS"] == 256
    return prove_offsets(launches[0].compiled.asm["ttir"], row.limits).unproved


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, compiler_cache(Path(folder)):
        found = {name: planted_faults(name) for name in PLANTED}
        found |= {name: mutant_faults(name) for name in MUTATED}
        found["most heads"] = most_heads_faults()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
