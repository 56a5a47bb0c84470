"""prefix_attention on flash-attn's varlen functions, emulated: every pair once, every gradient."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpost_kernels import (
    _flash_varlen,
    _prefix_flash_calls,
    prefix_attention,
    reference,
    workspace_bytes,
)
from fastpost_kernels._prefix_flash_calls import VarlenCall, varlen_calls
from fastpost_kernels._prefix_segments import schedule_of
from tests.ops import flash_attn_emulator as emulator
from tests.ops.test_prefix_attention import (
    DEEP,
    assert_close_to_reference,
    check,
    forests,
    leaf,
    make_inputs,
    run,
    segments_of,
)
from tests.ops.test_prefix_attention_op import LiveMemory

module = importlib.import_module("fastpost_kernels.prefix_attention")
flash = importlib.import_module("fastpost_kernels._prefix_flash")
FIND_KERNEL, UNAVAILABLE_REASON = _flash_varlen.varlen_kernel, _flash_varlen.unavailable_reason


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _flash_varlen.FlashAttention2(emulator.varlen_forward, emulator.varlen_backward)
    monkeypatch.setattr(_flash_varlen, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(_flash_varlen, "unavailable_reason", lambda query, head_size: None)


def visible(segments: Tensor, window: int | None) -> Tensor:
    """[N, N], from the specification: with equal scores, whoever is seen has weight."""
    num_tokens = int(segments[-1, 1])
    zeros = torch.zeros(1, num_tokens, 1, dtype=torch.float64)
    eye = torch.eye(num_tokens, dtype=torch.float64)[None]
    weights = reference.prefix_attention(zeros, zeros, eye, segments, window=window)
    return (weights[0] > 0).long()


def pairs(calls: list[VarlenCall], num_tokens: int) -> Tensor:
    """[N, N]: how many calls let a query see a key."""
    seen = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    for call in calls:
        for (query, query_end), (key, key_end) in call.sequences:
            offset = torch.arange(key_end - key) - torch.arange(query_end - query)[:, None]
            inside = torch.ones_like(offset, dtype=torch.bool)
            if call.left is not None:
                inside &= offset >= -call.left
            if call.right is not None:
                inside &= offset <= call.right
            if call.left is not None or call.right is not None:
                assert inside.shape[0] == inside.shape[1]
            seen[query:query_end, key:key_end] += inside
    return seen


@settings(max_examples=200)
@given(segments=forests(), window=st.none() | st.integers(1, 40))
def test_every_visible_pair_is_in_one_call(segments, window):
    num_tokens = int(segments[-1, 1])
    calls = varlen_calls(schedule_of(segments, num_tokens), window)
    assert torch.equal(pairs(calls, num_tokens), visible(segments, window))
    assert [call.right for call in calls] == [0] + [None] * (len(calls) - 1)
    for call in calls:
        queries = [q for sequence in call.sequences for q in range(*sequence.queries)]
        assert len(queries) == len(set(queries))
        assert sum(key_end - key for _, (key, key_end) in call.sequences) <= num_tokens


def test_one_prompt_takes_two_calls_and_gathers_nothing():
    segments = segments_of([(9, [leaf(3), leaf(4), leaf(5)])])
    calls = _prefix_flash_calls.placed_calls(schedule_of(segments, 21), None, torch.device("cpu"))
    assert [(call.queries, call.keys) for call in calls] == [
        (slice(0, 21), slice(0, 21)),
        (slice(9, 21), slice(0, 9)),
    ]
    assert calls[0].layout.cu_queries.tolist() == [0, 9, 12, 16, 21]


def test_many_sequences_are_several_calls(monkeypatch):
    monkeypatch.setattr(_prefix_flash_calls, "_MAX_SEQUENCES", 2)
    _prefix_flash_calls.placed_calls.cache_clear()
    calls = varlen_calls(schedule_of(DEEP, int(DEEP[-1, 1])), 6)
    assert max(len(call.sequences) for call in calls) == 2
    check(DEEP, torch.float64, backend="flash", window=6, sinks=True)
    _prefix_flash_calls.placed_calls.cache_clear()


@settings(max_examples=60)
@given(
    segments=forests(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    heads=st.sampled_from([(3, 3), (3, 1), (4, 1), (8, 2)]),
    sizes=st.sampled_from([(64, 64), (96, 96), (128, 128), (96, 64), (64, 96), (33, 7)]),
    scale=st.sampled_from([None, 0.3]),
    window=st.none() | st.integers(1, 30),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_forest_matches_the_specification(segments, dtype, **options):
    check(segments, dtype, backend="flash", **options)


@pytest.mark.parametrize("window", [None, 1, 4, 9, 17, 19, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_five_levels_with_everything(window, dtype):
    check(DEEP, dtype, backend="flash", window=window, softcap=3.0, sinks=True)


@pytest.mark.parametrize("window", [None, 3])
def test_rows_without_shared_prefixes(window):
    segments = segments_of([leaf(5), leaf(9), leaf(1)])
    check(segments, torch.bfloat16, backend="flash", window=window, sinks=True)


@pytest.mark.parametrize("size", [192, 256])
def test_wide_heads(size):
    check(DEEP, torch.bfloat16, backend="flash", sizes=(size, 128), window=11)


def test_the_same_bits_twice():
    inputs = make_inputs(DEEP, torch.bfloat16, sinks=True)
    first, second = (
        run(prefix_attention, inputs, DEEP, backend="flash", window=7) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("lost", ["triangles", "rectangles"])
def test_a_lost_call_is_caught(lost, monkeypatch):
    """Sabotage: without the calls of one shape the comparison must fail."""

    def incomplete(schedule, window):
        left = 0 if lost == "triangles" else None
        calls = varlen_calls(schedule, window)
        return [call for call in calls if call.right == 0 or call.left != left]

    monkeypatch.setattr(_prefix_flash_calls, "varlen_calls", incomplete)
    _prefix_flash_calls.placed_calls.cache_clear()
    with pytest.raises(AssertionError, match="above"):
        check(DEEP, torch.float32, backend="flash", window=7)
    _prefix_flash_calls.placed_calls.cache_clear()


def test_a_backward_with_its_own_statistics_is_caught(monkeypatch):
    """Sabotage: a region's own log-sum-exp instead of the merged one."""

    def local(**given: object) -> Tensor:
        options = {
            name: given[name]
            for name in inspect.signature(emulator.varlen_forward).parameters
            if name in given
        }
        _, given["softmax_lse"], *_ = emulator.varlen_forward(**options)
        return emulator.varlen_backward(**given)

    kernel = _flash_varlen.FlashAttention2(emulator.varlen_forward, local)
    monkeypatch.setattr(_flash_varlen, "varlen_kernel", lambda: kernel)
    with pytest.raises(AssertionError, match=r"grad_query: .* above"):
        check(DEEP, torch.float32, backend="flash")


def test_views_that_cannot_be_read_by_16_bytes_are_copied():
    """Rows of 8 values in a buffer of 19, at an odd offset; and a last dimension with a stride."""
    num_tokens = int(DEEP[-1, 1])
    buffer = torch.randn(num_tokens, 3, 19)
    views = [buffer[:, 0:2, 3:11], buffer[:, 1:2, 5:13], buffer[:, 2:3, 3:19:2]]
    inputs = [x.transpose(0, 1).detach().requires_grad_() for x in views]
    assert [x.stride(-1) for x in inputs] == [1, 1, 2]
    actual = run(prefix_attention, inputs, DEEP, backend="flash")
    assert_close_to_reference(actual, inputs, DEEP)


def test_no_tokens():
    inputs = [torch.randn(2, 0, 8, requires_grad=True) for _ in range(3)]
    out = prefix_attention(*inputs, torch.empty(0, 3, dtype=torch.int64), backend="flash")
    out.sum().backward()
    assert out.shape == (2, 0, 8)
    assert all(x.grad.shape == (2, 0, 8) for x in inputs)


def test_opcheck():
    query, key, value, sinks = make_inputs(DEEP, torch.bfloat16, sizes=(16, 8), sinks=True)
    arguments = (query, key, value, DEEP, sinks, 0.25, 5, 2.0, "flash")
    torch.library.opcheck(module._prefix_attention_fwd, arguments)


class EmptyKernel:
    """A kernel that takes no memory but its results."""

    def forward(self, query, key, value, layout, scale, softcap):
        lse = torch.zeros(query.shape[1], query.shape[0])
        return torch.zeros(query.shape, dtype=query.dtype), lse

    def backward(self, grad_out, query, key, value, out, lse, layout, scale, softcap):
        return tuple(torch.zeros(x.shape, dtype=x.dtype) for x in (query, key, value))


@pytest.mark.parametrize("window", [None, 150])
def test_workspace_bounds_the_live_memory(window, monkeypatch):
    """All but what flash-attn takes itself: its sums of dQ are counted by a formula only."""
    monkeypatch.setattr(_flash_varlen, "varlen_kernel", EmptyKernel)
    monkeypatch.setattr("fastpost_kernels._prefix_regions.MAX_SCORES", 0)
    monkeypatch.setattr("fastpost_kernels._prefix_costs._split_sums", lambda *_: 0)
    forest = [(200, [leaf(100), leaf(100)]), (100, [leaf(100)] * 3), leaf(50)]
    segments = segments_of(forest)
    inputs = make_inputs(segments, torch.bfloat16, sizes=(64, 40), sinks=True)
    query, key, value, sinks = (x.detach() for x in inputs)
    scoring = module.Scoring(0.1, window, None)
    schedule = schedule_of(segments, query.shape[1])
    _prefix_flash_calls.placed_calls(schedule, window, query.device)  # of all layers
    arguments = (query, key, value, segments, sinks, *scoring, "flash")
    with LiveMemory() as memory:
        out, lse = flash.forward_flash(query, key, value, sinks, schedule, scoring)
    used = memory.peak - out.nbytes - lse.nbytes
    bound = workspace_bytes(module._prefix_attention_fwd._opoverload, *arguments)
    assert used <= bound <= 3 * used
    arguments = (out, query, key, value, out, lse, segments, *scoring, "flash")
    with LiveMemory() as memory:
        grads = flash.backward_flash(out, query, key, value, out, lse, schedule, scoring)
    used = memory.peak - sum(x.nbytes for x in grads)
    bound = workspace_bytes(module._prefix_attention_bwd._opoverload, *arguments)
    assert used <= bound <= 3 * used


def test_the_installed_functions_are_found(monkeypatch):
    package = SimpleNamespace(
        _flash_attn_varlen_forward=emulator.varlen_forward,
        _flash_attn_varlen_backward=emulator.varlen_backward,
    )
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", package)
    monkeypatch.setattr(_flash_varlen, "varlen_kernel", FIND_KERNEL.__wrapped__)
    check(DEEP, torch.bfloat16, backend="flash")


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("version", "device", "capability", "dtype", "head_size", "message"),
    [
        (None, GPU, (9, 0), torch.bfloat16, 64, "which is not installed"),
        ("2.7.4.post1", GPU, (9, 0), torch.bfloat16, 64, "2.8 by name, found 2.7.4.post1"),
        ("2.9.0", GPU, (9, 0), torch.bfloat16, 64, "found 2.9.0"),
        ("2.8.3", torch.device("cpu"), (9, 0), torch.bfloat16, 64, "NVIDIA GPU, got cpu"),
        ("2.8.3", GPU, (7, 5), torch.float16, 64, "capability 8.0"),
        ("2.8.3", GPU, (9, 0), torch.float32, 64, "bfloat16, got torch.float32"),
        ("2.8.3", GPU, (9, 0), torch.bfloat16, 257, "at most 256, got 257"),
        ("2.8.3.post1", GPU, (8, 0), torch.float16, 256, None),
        ("2.8.0+cu12", GPU, (9, 0), torch.bfloat16, 128, None),
    ],
)
def test_what_flash_attn_cannot_do_is_said(
    version, device, capability, dtype, head_size, message, monkeypatch
):
    if version is not None:
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = UNAVAILABLE_REASON(SimpleNamespace(device=device, dtype=dtype), head_size)
    assert reason is None if message is None else message in reason


def test_a_refusal_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(_flash_varlen, "unavailable_reason", UNAVAILABLE_REASON)
    inputs = make_inputs(DEEP, torch.bfloat16)
    with pytest.raises(ValueError, match=r"backend 'flash' .*; use 'auto'"):
        prefix_attention(*inputs, DEEP, backend="flash")


def test_auto_is_never_flash():
    assert module._resolve_backend("auto", *make_inputs(DEEP, torch.bfloat16)[:2]) == "cpu"


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn"
)
def test_the_package_is_the_emulated_one():
    """Names and order of parameters; on a GPU also values and gradients."""
    package = importlib.import_module("flash_attn.flash_attn_interface")
    for name in ("forward", "backward"):
        real = getattr(package, f"_flash_attn_varlen_{name}")
        ours = inspect.signature(getattr(emulator, f"varlen_{name}"))
        names = list(inspect.signature(getattr(real, "_init_fn", real)).parameters)
        assert names[: len(ours.parameters)] == list(ours.parameters)
    if not torch.cuda.is_available():
        return
    inputs = [x.detach().cuda().requires_grad_() for x in make_inputs(DEEP, torch.bfloat16)]
    kernel = FIND_KERNEL()
    with mock.patch.object(_flash_varlen, "varlen_kernel", lambda: kernel):
        actual = run_on_gpu(inputs)
    assert_close_to_reference([x.cpu() for x in actual], [x.cpu() for x in inputs], DEEP, window=7)


def run_on_gpu(inputs: list[Tensor]) -> list[Tensor]:
    out = prefix_attention(*inputs, DEEP, window=7, backend="flash")
    generator = torch.Generator().manual_seed(7)  # as `run`
    grad_out = torch.randn(out.transpose(0, 1).shape, generator=generator).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out))]
