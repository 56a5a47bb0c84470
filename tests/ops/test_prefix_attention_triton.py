"""The Triton kernels of prefix_attention: in the interpreter, and compiled for three GPUs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastpost_kernels import prefix_attention, reference
from fastpost_kernels.testing import assert_close_to_reference

host = importlib.import_module("fastpost_kernels._prefix_triton")
segments_module = importlib.import_module("fastpost_kernels._prefix_segments")

# Depth 4; segments below one block of 32 and above it, one token, siblings; 128 tokens.
SEGMENTS = torch.tensor(
    [
        [0, 40, 110],
        [40, 75, 100],
        [75, 76, 90],
        [76, 90, 90],
        [90, 100, 100],
        [100, 110, 110],
        [110, 128, 128],
    ]
)
NUM_TOKENS = 128


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays per program: tiles of 32 rows and 16 keys, so that blocks end midway."""
    tiles = dict.fromkeys(("forward", "grad_query", "grad_key"), (32, 16, 4, 1))
    monkeypatch.setattr(host, "choose_tiles", lambda *_: tiles)


def run(function, inputs: list[Tensor], **options) -> list[Tensor]:
    """Output and the gradients of all inputs, for one fixed grad_output."""
    if len(inputs) == 4:
        options["sinks"] = inputs[3]
    out = function(*inputs[:3], SEGMENTS, **options)
    generator = torch.Generator().manual_seed(7)
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def make_inputs(
    dtype: torch.dtype, sizes: tuple[int, int], heads: tuple[int, int], sinks: bool
) -> list[Tensor]:
    shapes = [(heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])]
    inputs = [torch.randn(NUM_TOKENS, h, d).to(dtype).transpose(0, 1) for h, d in shapes]
    if sinks:
        inputs.append(torch.randn(heads[0]).to(dtype))
    return [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "heads", "sinks", "options"),
    [
        ((64, 64), (2, 2), False, {}),
        ((96, 64), (3, 1), True, {"window": 30}),
        ((64, 96), (3, 1), False, {"softcap": 3.0, "scale": 0.3}),
        ((16, 16), (4, 2), True, {"window": 7, "softcap": 2.0}),
        ((192, 128), (1, 1), False, {}),
    ],
    ids=["plain", "window-sinks", "softcap", "all", "wide"],
)
def test_matches_the_specification(sizes, heads, options, sinks, dtype, poisoned_memory):
    inputs = make_inputs(dtype, sizes, heads, sinks)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = run(reference.prefix_attention, exact, **options)
    baseline = run(reference.prefix_attention, inputs, **options)
    actual = run(prefix_attention, inputs, backend="triton", **options)
    names = ("out", "grad_query", "grad_key", "grad_value", "grad_sinks")
    for name, *three in zip(names, actual, truth, baseline, strict=False):
        assert_close_to_reference(*three, dtype, name)


def test_keys_outside_a_block_cannot_overflow():
    """Scores of −300 everywhere: a stray zero score would be exp(300) against their lse."""
    inputs = make_inputs(torch.bfloat16, (16, 16), (1, 1), False)
    with torch.no_grad():
        inputs[0].fill_(1.0)
        inputs[1].fill_(-75.0)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = run(reference.prefix_attention, exact)
    baseline = run(reference.prefix_attention, inputs)
    actual = run(prefix_attention, inputs, backend="triton")
    for index in (0, 3):  # equal scores: the gradients of query and key vanish
        assert_close_to_reference(actual[index], truth[index], baseline[index], torch.bfloat16)
    assert actual[1].abs().max() < 1.0 and actual[2].abs().max() < 1.0


def test_the_backward_gives_the_same_bits_twice():
    inputs = make_inputs(torch.bfloat16, (16, 16), (2, 1), False)
    first, second = (run(prefix_attention, inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tables_cover_every_token_once_and_join_touching_ranges():
    schedule = segments_module.schedule_of(SEGMENTS, NUM_TOKENS)
    blocks, ranges = host._query_table(schedule, 32, torch.device("cpu"))
    rows = sorted(row for first, end, *_ in blocks.tolist() for row in range(first, end))
    assert rows == list(range(NUM_TOKENS))
    walks = {
        first: [tuple(r) for r in ranges[low:high].tolist()]
        for first, _, low, high in blocks.tolist()
    }
    assert walks[76] == [(0, 90)]  # a chain of first children is one range
    assert walks[90] == [(0, 75), (90, 100)]
    assert walks[100] == [(0, 40), (100, 110)]
    keys = host._key_table(schedule, 32, torch.device("cpu")).tolist()
    assert sorted(key for first, end, _ in keys for key in range(first, end)) == rows
    assert [0, 32, 110] in keys and [40, 72, 100] in keys


def test_refusals():
    x = torch.randn(1, NUM_TOKENS, 16)
    with pytest.raises(ValueError, match="at most 32-bit floats"):
        prefix_attention(x.double(), x.double(), x.double(), SEGMENTS, backend="triton")
    wide = torch.randn(1, NUM_TOKENS, 257)
    with pytest.raises(ValueError, match="257"):
        prefix_attention(wide, wide, wide, SEGMENTS, backend="triton")


# Compiles the three kernels for a GPU that need not be there, and prints what they take. A process
# of its own, because this one has the interpreter in place of the compiler.
COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastpost_kernels import _prefix_kernels as kernels, _prefix_triton as host

capability, head_size = int(sys.argv[1]), int(sys.argv[2])
tiles = host.choose_tiles(head_size, 2, capability)
TYPES = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "blocks_ptr": "*i32", "ranges_ptr": "*i32",
         "positions_ptr": "*i32", "scale": "fp32", "softcap": "fp32"}
both = [(True, True)] if head_size <= 128 else [(True, False), (False, True)]
jobs = [(kernels.prefix_attention_fwd_kernel, "forward", {"HAS_SINKS": True}),
        (kernels.prefix_attention_bwd_query_kernel, "grad_query", {})]
jobs += [(kernels.prefix_attention_bwd_key_kernel, "grad_key",
          {"NEEDS_KEY": k, "NEEDS_VALUE": v}) for k, v in both]
for kernel, name, flags in jobs:
    for extras in [True] if sys.argv[3] == "largest" else [False, True]:
        block_m, block_n, num_warps, num_stages = tiles[name]
        block = triton.next_power_of_2(head_size)
        constants = {"GROUPS": 4, "HEAD_SIZE": head_size, "VALUE_SIZE": head_size,
                     "HAS_SOFTCAP": extras, "HAS_WINDOW": extras, "BLOCK_M": block_m,
                     "BLOCK_N": block_n, "BLOCK_D": block, "BLOCK_DV": block, **flags}
        signature, attributes = {}, {}
        for index, argument in enumerate(kernel.arg_names):
            pointer = argument.endswith("_ptr")
            default = "*bf16" if pointer else "i32"
            signature[argument] = TYPES.get(argument, default)
            if argument in constants:
                signature[argument] = "constexpr"
            elif pointer or (argument.startswith("stride") and argument != "stride_lh"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(
            fn=kernel, signature=signature, attrs=attributes,
            constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                                  options={"num_warps": num_warps, "num_stages": num_stages})
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True,
                                   check=True).stdout
        registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
        tensor_core = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
        print(json.dumps({
            "kernel": name, "softcap and window": extras, "registers": int(registers),
            "stack": int(stack), "shared": compiled.metadata.shared,
            "tensor core": compiled.asm["ptx"].count(tensor_core)}))
"""
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def assert_compiles_well(capability: int, head_size: int, variants: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    completed = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), str(head_size), variants],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert completed.returncode == 0, completed.stderr
    kernels = [json.loads(line) for line in completed.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {"forward", "grad_query", "grad_key"}
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert kernel["tensor core"] > 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel


@pytest.mark.parametrize(
    ("capability", "head_size"), [(80, 128), (90, 64), (90, 128), (90, 256), (100, 128)]
)
def test_compiles_to_tensor_cores_without_spills(capability, head_size):
    """With softcap and window, which take the most registers."""
    assert_compiles_well(capability, head_size, "largest")


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_in_every_variant(capability, head_size):
    assert_compiles_well(capability, head_size, "all")
