"""The Triton kernels of prefix_attention: in the interpreter, and what the compiler makes of them.

`test_static_compile.py` compiles them for data centre GPUs.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastpost_kernels import prefix_attention, reference, workspace_bytes
from fastpost_kernels.testing import assert_close_to_reference
from tests.ops.test_prefix_attention_op import LiveMemory

host = importlib.import_module("fastpost_kernels._prefix_triton")
ROOT = Path(__file__).parents[2]
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
        ((64, 96), (2, 2), False, {"softcap": 3.0, "scale": 0.3}),
        ((16, 16), (2, 1), True, {"window": 7, "softcap": 2.0}),
        ((192, 128), (1, 1), False, {}),
        ((128, 128), (2, 1), True, {"window": 30, "softcap": 3.0}),
        ((256, 256), (1, 1), True, {"window": 30, "softcap": 3.0}),
    ],
    ids=["plain", "window-sinks", "softcap", "all", "wide", "128-all", "256-all"],
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
    inputs = make_inputs(torch.bfloat16, (16, 16), (2, 1), True)
    options = {"window": 30, "softcap": 3.0, "backend": "triton"}
    first, second = (run(prefix_attention, inputs, **options) for _ in range(2))
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


def test_kernels_read_the_callers_keys_and_values(monkeypatch):
    """Regions are ranges of tokens: nothing is gathered, padded or repeated for a launch."""
    launched: list[tuple] = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(args)

    for name in ("fwd", "bwd_query", "bwd_key"):
        monkeypatch.setattr(host, f"prefix_attention_{name}_kernel", Recorder())
    inputs = make_inputs(torch.bfloat16, (16, 24), (2, 1), False)
    run(prefix_attention, inputs, backend="triton")
    assert len(launched) == 3
    for tensors in launched:
        for seen, given in zip(tensors, inputs, strict=False):
            assert seen.data_ptr() == given.data_ptr() and seen.stride() == given.stride()


def test_refusals():
    x = torch.randn(1, NUM_TOKENS, 16)
    with pytest.raises(ValueError, match="at most 32-bit floats"):
        prefix_attention(x.double(), x.double(), x.double(), SEGMENTS, backend="triton")
    wide = torch.randn(1, NUM_TOKENS, 257)
    with pytest.raises(ValueError, match="257"):
        prefix_attention(wide, wide, wide, SEGMENTS, backend="triton")


def variants(*arguments: str) -> list[dict]:
    """What `tests.ops.attention_variants` prints: here the interpreter stands for the compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.attention_variants", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_one_variant_serves_segments_of_any_length():
    """1 to 5,108 tokens in 1 to 5 segments, divisible by 16 or not, in two layouts."""
    assert variants("specialisations") == [
        {f"prefix_attention_{name}_kernel": 1 for name in ("fwd", "bwd_query", "bwd_key")}
    ]


# Consumer GPUs, which `bench.static` does not compile for. 192 and 128 are those of DeepSeek-V3,
# which has neither softcap nor window: with both the forward spills 16 bytes.
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["89", "120"])
def test_consumer_gpus_neither_spill_nor_run_out_of_shared_memory(capability):
    for size in ("64", "96", "128", "192", "256"):
        rows = variants("compile", capability, size, size, "full")
        assert {row["kernel"] for row in rows} == {"fwd", "bwd_query", "bwd_key"}
        for row in rows:
            assert row["spilled_bytes"] == 0, (size, row)
            assert row["shared"] <= 99 * 1024, (size, row)
            assert row["instructions"]["mma.sync"] > 0, (size, row)


def test_the_backward_holds_one_slab_in_fp32(monkeypatch):
    """Equal in slabs, and within the bound, which is far below an fp32 copy of dO or O."""
    inputs = make_inputs(torch.bfloat16, (16, 16), (2, 1), sinks=False)
    whole = run(prefix_attention, inputs, backend="triton")
    for name in ("_prefix_triton", "_prefix_costs"):
        monkeypatch.setattr(f"fastpost_kernels.{name}.SLAB_ELEMENTS", 2 * 16 * 24)
    for mine, other in zip(run(prefix_attention, inputs, backend="triton"), whole, strict=True):
        assert torch.equal(mine, other)
    query, key, value = (x.detach() for x in inputs)
    schedule = segments_module.schedule_of(SEGMENTS, NUM_TOKENS)
    scoring = importlib.import_module("fastpost_kernels._prefix_regions").Scoring(0.1, None, None)
    out, lse = host.forward_triton(query, key, value, None, schedule, scoring)
    with LiveMemory() as memory:
        grads = host.backward_triton(out, query, key, value, out, lse, schedule, scoring)
    used = memory.peak - sum(x.nbytes for x in grads)
    op = importlib.import_module("fastpost_kernels.prefix_attention")._prefix_attention_bwd
    arguments = (out, query, key, value, out, lse, SEGMENTS, 0.1, None, None, "triton")
    bound = workspace_bytes(op._opoverload, *arguments)
    assert used <= bound < 4 * out.numel()
