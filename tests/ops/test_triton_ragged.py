"""The Triton backend at ragged sizes and in any layout, against the reference in float64.

Tiles are small, so that few rows already end in the middle of a block, in the last column of a tile
or one past it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpost_kernels import _vocab_passes_triton as passes
from fastpost_kernels import _vocab_tiles, linear_logprob, prefix_attention, reference
from fastpost_kernels.testing import EPSILON, Canary

prefix_host = importlib.import_module("fastpost_kernels._prefix_triton")

BF16, FP32 = torch.bfloat16, torch.float32
TILE = 64
VALUES = ("logprob", "entropy", "log_sum_sq_probs", "mean_logits", "logsumexp")
OUTPUTS = (*VALUES[1:], "is_top1")
DIFFERENTIATED = ("logprob", "entropy", "logsumexp")
TRANSFORMED = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}

Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    tiles = dict.fromkeys(("forward", "grad_query", "grad_key"), (16, 16, 4, 1))
    monkeypatch.setattr(prefix_host, "choose_tiles", lambda *_: tiles)
    monkeypatch.setattr(_vocab_tiles, "TILE_COLS", TILE)
    monkeypatch.setattr(_vocab_tiles, "MIN_COLS", TILE)
    monkeypatch.setattr(passes, "GRADIENT_BLOCK", 32)
    monkeypatch.setattr(passes, "RESCALE_BLOCK", 16)


def head_of(rows: int, width: int, vocab: int, bias: bool, dtype: torch.dtype) -> Results:
    found = {"hidden": torch.randn(rows, width) / width**0.5, "weight": torch.randn(vocab, width)}
    if bias:
        found["bias"] = torch.randn(vocab)
    return {name: value.to(dtype) for name, value in found.items()}


def logprob_results(
    head: Results, targets: Tensor, wanted: tuple[str, ...], backend: str | None, **options: Any
) -> Results:
    """Values, and the gradients of `wanted` for fixed gradients of the outputs."""
    leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in head.items()}
    if backend is None:
        values = reference.linear_logprob(targets=targets, **leaves, **options)
    else:
        found = linear_logprob(
            targets=targets, **leaves, outputs=OUTPUTS, backend=backend, **options
        )
        values = found._asdict()
    generator = torch.Generator().manual_seed(5)
    names = DIFFERENTIATED if len(wanted) > 1 else ("logprob",)
    seeds = {name: torch.randn(len(targets), generator=generator) for name in names}
    loss = sum((values[name] * seed.to(values[name].dtype)).sum() for name, seed in seeds.items())
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    results = {name: values[name].detach() for name in VALUES}
    return results | {f"grad_{n}": g for n, g in zip(wanted, grads, strict=True)}


def attention_results(
    function: Callable[..., Tensor], inputs: list[Tensor], segments: Tensor, **options: Any
) -> Results:
    """Output and every gradient for one fixed gradient of the output."""
    names = ("query", "key", "value", "sinks")
    leaves = [x.detach().requires_grad_() for x in inputs]
    if len(leaves) == 4:
        options["sinks"] = leaves[3]
    out = function(*leaves[:3], segments, **options)
    generator = torch.Generator().manual_seed(7)
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, grad_out)
    return {"out": out.detach()} | {f"grad_{n}": g for n, g in zip(names, grads, strict=False)}


def logprob_truth(
    head: Results, targets: Tensor, wanted: tuple[str, ...], **options: Any
) -> tuple[Results, Results]:
    """The reference in float64 and in the head's dtype."""
    exact = {name: value.double() for name, value in head.items()}
    return (
        logprob_results(exact, targets, wanted, None, **options),
        logprob_results(head, targets, wanted, None, **options),
    )


def attention_truth(
    inputs: list[Tensor], segments: Tensor, **options: Any
) -> tuple[Results, Results]:
    exact = [x.double() for x in inputs]
    return (
        attention_results(reference.prefix_attention, exact, segments, **options),
        attention_results(reference.prefix_attention, inputs, segments, **options),
    )


def allowance(truth: Tensor, rough: Tensor, dtype: torch.dtype) -> float:
    """Twice the error of the reference in `dtype`, plus a share of the largest entry, or of 1.

    The truth may be zero, as the entropy of one token is: then terms of size 1 cancel.
    """
    error = float((rough.double() - truth).abs().max()) if truth.numel() else 0.0
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    return 2 * error + EPSILON[dtype] * max(1.0, largest)


def assert_all_close(actual: Results, truths: tuple[Results, Results], dtype: torch.dtype) -> None:
    truth, rough = truths
    assert actual.keys() == truth.keys()
    for name, got in actual.items():
        assert got.shape == truth[name].shape and torch.isfinite(got).all(), name
        error = float((got.double() - truth[name]).abs().max()) if got.numel() else 0.0
        limit = allowance(truth[name], rough[name], dtype)
        assert error <= limit, f"{name}: {error:.2e} above {limit:.2e}"


def assert_logprob_close(
    head: Results, targets: Tensor, wanted: tuple[str, ...], dtype: torch.dtype, **options: Any
) -> None:
    actual = logprob_results(head, targets, wanted, "triton", **options)
    options.pop("memory_budget", None)
    assert_all_close(actual, logprob_truth(head, targets, wanted, **options), dtype)


EDGES = [1, 2, 31, 32, 33, TILE - 1, TILE, TILE + 1, 2 * TILE + 33, 3 * TILE]


@settings(max_examples=10)
@given(
    rows=st.integers(0, 20) | st.just(64),
    width=st.sampled_from([1, 15, 16, 17, 40]),
    vocab=st.sampled_from(EDGES),
    masked=st.sampled_from(["none", "some", "but one", "all"]),
    bias=st.booleans(),
    trained=st.booleans(),
    options=st.sampled_from([{}, TRANSFORMED]),
    budget=st.sampled_from([None, 2000]),
    dtype=st.sampled_from([FP32, BF16]),
)
@example(64, 32, 161, "some", True, True, TRANSFORMED, 2000, BF16)
@example(5, 17, 65, "all", True, True, {}, None, FP32)
@example(5, 17, 65, "all", False, False, {}, None, BF16)
@example(0, 17, 65, "none", True, True, {}, None, FP32)
@example(3, 16, 1, "none", True, True, {}, None, FP32)
def test_logprob_of_any_size(
    rows: int,
    width: int,
    vocab: int,
    masked: str,
    bias: bool,
    trained: bool,
    options: dict[str, float],
    budget: int | None,
    dtype: torch.dtype,
) -> None:
    head = head_of(rows, width, vocab, bias, dtype)
    targets = torch.randint(0, vocab, (rows,))
    skipped = {"none": slice(0), "some": slice(0, None, 3), "but one": slice(1, None)}
    targets[skipped.get(masked, slice(None))] = -100
    wanted = tuple(head) if trained else ("hidden",)
    assert_logprob_close(head, targets, wanted, dtype, memory_budget=budget, **options)


@st.composite
def forests(draw: st.DrawFn) -> Tensor:
    """Segments [S, 3]: lengths around the block of 16, any nesting, at most 64 tokens."""
    lengths = draw(st.lists(st.sampled_from([1, 2, 7, 15, 16, 17]), min_size=1, max_size=6))
    rows: list[list[int]] = []
    path: list[int] = []
    end = 0
    for length in lengths:
        if end + length > 64:
            break
        path = path[: draw(st.integers(0, len(path)))]
        path.append(len(rows))
        rows.append([end, end + length, 0])
        end += length
        for row in path:
            rows[row][2] = end
    return torch.tensor(rows)


def attention_inputs(
    segments: Tensor,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    sinks: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    tokens = int(segments[-1, 1])
    shapes = [(heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])]
    inputs = [torch.randn(tokens, *shape).to(dtype).transpose(0, 1) for shape in shapes]
    return [*inputs, *([torch.randn(heads[0]).to(dtype)] if sinks else [])]


@settings(max_examples=6)
@given(
    segments=forests(),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1)]),
    sizes=st.sampled_from([(16, 16), (1, 3), (17, 8), (8, 33)]),
    sinks=st.booleans(),
    window=st.sampled_from([None, 1, 2, 15, 16, 17]),
    softcap=st.sampled_from([None, 2.0]),
    dtype=st.sampled_from([FP32, BF16]),
)
def test_attention_over_any_forest(
    segments: Tensor,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    sinks: bool,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    inputs = attention_inputs(segments, heads, sizes, sinks, dtype)
    options = {"window": window, "softcap": softcap}
    actual = attention_results(prefix_attention, inputs, segments, backend="triton", **options)
    assert_all_close(actual, attention_truth(inputs, segments, **options), dtype)


def test_attention_over_no_tokens() -> None:
    empty = torch.empty(0, 3, dtype=torch.int64)
    inputs = [torch.empty(2, 0, 8) for _ in range(3)]
    for name, result in attention_results(
        prefix_attention, inputs, empty, backend="triton"
    ).items():
        assert result.shape == (2, 0, 8), name


def layouts_of(x: Tensor) -> dict[str, Tensor]:
    """`x` one element off alignment, sliced out of something wider, and last dimension apart."""
    contiguous = list(x.contiguous().stride())
    last_apart = [2 * stride for stride in contiguous]
    return {
        "misaligned": Canary(x, margin=1, strides=contiguous).inner,
        "sliced": Canary(x, margin=3).inner,
        "last dimension apart": Canary(x, margin=1, strides=last_apart).inner,
        "transposed": x.mT.contiguous().mT,
    }


LAYOUTS = ("misaligned", "sliced", "last dimension apart", "transposed")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_the_same_in_any_layout(layout: str, dtype: torch.dtype) -> None:
    """Bit for bit; the gradient of the output comes in that layout too."""
    segments = torch.tensor([[0, 9, 26], [9, 26, 26]])
    inputs = attention_inputs(segments, (2, 1), (16, 16), False, dtype)
    grad_out = torch.randn(2, 26, 16).to(dtype)

    def results(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = prefix_attention(*leaves, segments, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]

    contiguous = [x.contiguous() for x in (*inputs, grad_out)]
    moved = [layouts_of(x)[layout] for x in contiguous]
    assert all(
        a.stride() != b.stride() or a.storage_offset() == 1
        for a, b in zip(moved, contiguous, strict=True)
    )
    for got, wanted in zip(results(*moved), results(*contiguous), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_logprob_is_right_in_any_layout(layout: str, trained: bool, dtype: torch.dtype) -> None:
    """Not bit for bit: PyTorch's matrix products choose another order of summation."""
    head = head_of(7, 64, 130, True, dtype)
    moved = {
        name: (value if value.ndim == 1 else layouts_of(value)[layout])
        for name, value in head.items()
    }
    moved["bias"] = Canary(head["bias"], margin=1, strides=(3,)).inner
    targets = Canary(torch.randint(0, 130, (7,)), margin=1, strides=(2,)).inner
    assert_logprob_close(moved, targets, tuple(head) if trained else ("hidden",), dtype)


def perturbed(results: Results, name: str, truths: tuple[Results, Results]) -> Results:
    """`results`, one of them off by 4 tolerances in one element."""
    changed = truths[0][name].clone()
    changed[(0,) * changed.ndim] += 4 * allowance(truths[0][name], truths[1][name], FP32)
    return results | {name: changed}


def test_four_tolerances_off_are_caught_in_every_result_of_logprob() -> None:
    head, targets = head_of(9, 16, 70, True, FP32), torch.randint(0, 70, (9,))
    wanted = tuple(head)
    actual = logprob_results(head, targets, wanted, "triton")
    truths = logprob_truth(head, targets, wanted)
    assert_all_close(actual, truths, FP32)
    for name in actual:
        wrong = perturbed(actual, name, truths)
        with pytest.raises(AssertionError, match=name):
            assert_all_close(wrong, truths, FP32)


def test_four_tolerances_off_are_caught_in_every_result_of_attention() -> None:
    segments = torch.tensor([[0, 9, 26], [9, 26, 26]])
    inputs = attention_inputs(segments, (2, 1), (16, 16), True, FP32)
    actual = attention_results(prefix_attention, inputs, segments, backend="triton")
    truths = attention_truth(inputs, segments)
    assert_all_close(actual, truths, FP32)
    for name in actual:
        wrong = perturbed(actual, name, truths)
        with pytest.raises(AssertionError, match=name):
            assert_all_close(wrong, truths, FP32)
