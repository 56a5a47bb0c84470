"""prefix_attention against the dense float64 specification: values and every gradient."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpost_kernels import prefix_attention, reference

passes = importlib.import_module("fastpost_kernels._prefix_passes")
regions = importlib.import_module("fastpost_kernels._prefix_regions")

# Share of the largest entry (of 1 where that is smaller) that the reference may escape by luck, as
# where the truth is zero: dO·v − dO·out cancels terms of size √Dv, here up to 11.
EPS = {torch.float64: 2e-14, torch.float32: 1e-5, torch.bfloat16: 4e-3}

Tree = tuple[int, list]  # (tokens, children)


def segments_of(forest: list[Tree]) -> Tensor:
    """Segments [S, 3] of trees in depth-first order."""
    rows: list[list[int]] = []

    def visit(tree: Tree, start: int) -> int:
        length, children = tree
        row = [start, start + length, 0]
        rows.append(row)
        end = start + length
        for child in children:
            end = visit(child, end)
        row[2] = end
        return end

    end = 0
    for tree in forest:
        end = visit(tree, end)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def leaf(length: int) -> Tree:
    return (length, [])


DEEP = segments_of(
    [
        (9, [(5, [leaf(3), (1, [leaf(2), leaf(4)])]), leaf(4), leaf(4)]),
        leaf(1),
        (2, [(3, [(4, [(5, [leaf(6)])])])]),
    ]
)


def forests() -> st.SearchStrategy[Tensor]:
    lengths = st.integers(1, 9)
    trees = st.recursive(
        lengths.map(leaf), lambda t: st.tuples(lengths, st.lists(t, max_size=3)), max_leaves=6
    )
    return st.lists(trees, min_size=1, max_size=3).map(segments_of)


def make_inputs(
    segments: Tensor,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (6, 2),
    sizes: tuple[int, int] = (64, 64),
    sinks: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Query, key, value (and sinks): heads outermost in shape, tokens outermost in memory."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = int(segments[-1, 1]) if len(segments) else 0
    shapes = [(heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])]
    tensors = [
        torch.randn(num_tokens, h, d, generator=generator).to(dtype).transpose(0, 1)
        for h, d in shapes
    ]
    if sinks:
        tensors.append(torch.randn(heads[0], generator=generator).to(dtype))
    return [x.requires_grad_() for x in tensors]


def run(function, inputs: list[Tensor], segments: Tensor, **options) -> list[Tensor]:
    """Output and the gradients of all inputs, for one fixed grad_output."""
    if len(inputs) == 4:
        options["sinks"] = inputs[3]
    out = function(*inputs[:3], segments, **options)
    generator = torch.Generator().manual_seed(7)
    grad_out = torch.randn(out.transpose(0, 1).shape, generator=generator).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]


def assert_close_to_reference(
    actual: list[Tensor], inputs: list[Tensor], segments: Tensor, **options
) -> None:
    """err(op) ≤ 2·err(reference in its dtype) + eps·max(1, |truth|), as maximum and as RMS."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = run(reference.prefix_attention, exact, segments, **options)
    eager = run(reference.prefix_attention, inputs, segments, **options)
    names = ["out", "grad_query", "grad_key", "grad_value", "grad_sinks"]
    for name, got, plain, true in zip(names, actual, eager, truth, strict=False):
        assert got.dtype == inputs[0].dtype
        assert got.shape == true.shape
        for norm in (math.inf, 2):
            size = true.numel() ** 0.5 if norm == 2 else 1.0
            error, allowed = (
                torch.linalg.vector_norm(x.double() - true, norm).item() / size
                for x in (got, plain)
            )
            limit = 2 * allowed + EPS[got.dtype] * max(1.0, true.abs().max().item())
            assert error <= limit, f"{name}: {error:.2e} above {limit:.2e} in norm {norm}"


def check(segments: Tensor, dtype: torch.dtype, *, backend: str = "auto", **options) -> None:
    keys = ("heads", "sizes", "sinks", "seed")
    inputs = make_inputs(segments, dtype, **{k: options.pop(k) for k in keys if k in options})
    actual = run(prefix_attention, inputs, segments, backend=backend, **options)
    assert_close_to_reference(actual, inputs, segments, **options)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    segments=forests(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    heads=st.sampled_from([(3, 3), (3, 1), (4, 1), (8, 2)]),
    sizes=st.sampled_from([(64, 64), (96, 96), (128, 128), (96, 64), (64, 96)]),
    scale=st.sampled_from([None, 0.3]),
    window=st.none() | st.integers(1, 30),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    backend=st.sampled_from(["cpu", "torch"]),
    seed=st.integers(0, 3),
)
def test_any_forest_matches_the_specification(segments, dtype, **options):
    check(segments, dtype, **options)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "forest",
    [
        [leaf(1)],
        [leaf(1), leaf(1), leaf(1)],
        [(1, [leaf(1), leaf(1)])],
        [leaf(7), leaf(7), leaf(7), leaf(3)],  # equal lengths: one batched call
        [(5, [leaf(5), leaf(5)])],  # a run that starts with its own ancestor
        [(3, [(3, [(3, [(3, [(3, [leaf(3)])])])])])],  # one chain cut into pieces
    ],
    ids=["one", "three-ones", "ones-shared", "runs", "run-from-ancestor", "chain"],
)
def test_pinned_forests(forest, dtype, backend):
    check(segments_of(forest), dtype, backend=backend)


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 3.0}], ids=str)
def test_rows_long_enough_for_the_16_bit_backward(options, monkeypatch):
    """At 384 rows and more the backward of PyTorch's kernel runs in bf16 instead of fp32."""
    monkeypatch.setattr("fastpost_kernels._prefix_native._MAX_PATH_ON_TILES", 0)
    segments = segments_of([(200, [leaf(390), leaf(20)])])
    check(segments, torch.bfloat16, heads=(2, 1), **options)


def test_many_small_row_chunks(monkeypatch):
    monkeypatch.setattr(regions, "MAX_SCORES", 64)
    for window in (None, 1, 6, 11):
        check(DEEP, torch.float32, backend="torch", window=window, softcap=4.0, sinks=True)


def test_runs_are_split_in_the_backward(monkeypatch):
    monkeypatch.setattr(passes, "copies_per_backward", lambda length, num_heads: 2)
    check(segments_of([(4, [leaf(4)] * 6)]), torch.bfloat16)


@pytest.mark.parametrize("side", ["prefix", "suffix"])
def test_scores_that_differ_by_forty_between_regions(side):
    """Merging must survive regions that carry all or nothing of a row's weight."""
    segments = segments_of([(16, [leaf(8), leaf(8)])])
    query, key, value = make_inputs(segments, torch.float32, heads=(2, 2))
    chosen = slice(0, 16) if side == "prefix" else slice(16, 32)
    with torch.no_grad():
        query.abs_()
        key[:, chosen] = key[:, chosen].abs() * 8  # scores near 8·Σ|q||k|/8 = 40
    inputs = [query, key, value]
    actual = run(prefix_attention, inputs, segments)
    assert_close_to_reference(actual, inputs, segments)


@pytest.mark.parametrize("which", range(5))
def test_an_error_of_four_tolerances_is_caught(which):
    """Sabotage of the output and of each gradient in turn."""
    inputs = make_inputs(DEEP, torch.float32, sinks=True)
    actual = run(prefix_attention, inputs, DEEP)
    assert_close_to_reference(actual, inputs, DEEP)
    eager = run(reference.prefix_attention, inputs, DEEP)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = run(reference.prefix_attention, exact_inputs, DEEP)
    tolerance = 2 * (eager[which] - exact[which]).abs().max()
    tolerance += EPS[torch.float32] * max(1.0, exact[which].abs().max().item())
    actual[which][(0,) * actual[which].ndim] += 4 * tolerance
    with pytest.raises(AssertionError, match="above"):
        assert_close_to_reference(actual, inputs, DEEP)


def test_siblings_may_change_places():
    """Rows are independent: swapping two answers swaps their results."""
    first, second = segments_of([(6, [leaf(5), leaf(3)])]), segments_of([(6, [leaf(3), leaf(5)])])
    order = torch.tensor([*range(6), *range(11, 14), *range(6, 11)])
    inputs = make_inputs(first, torch.float64)
    swapped = [x.detach()[:, order].requires_grad_() for x in inputs]
    out = prefix_attention(*inputs, first)
    torch.testing.assert_close(
        out[:, order], prefix_attention(*swapped, second), rtol=0, atol=EPS[torch.float64]
    )


def test_rows_without_shared_prefixes_equal_pytorchs_attention():
    segments = segments_of([leaf(12)] * 4)
    query, key, value = (x.detach() for x in make_inputs(segments, torch.float32, heads=(4, 4)))
    rows = [x.unflatten(1, (4, 12)).transpose(0, 1) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True)
    actual = prefix_attention(query, key, value, segments)
    assert torch.equal(actual, expected.transpose(0, 1).flatten(1, 2))


def test_a_window_no_path_exceeds_changes_nothing():
    inputs = make_inputs(DEEP, torch.bfloat16)
    longest = 20  # 2 + 3 + 4 + 5 + 6 tokens
    without = run(prefix_attention, inputs, DEEP)
    with_window = run(prefix_attention, inputs, DEEP, window=longest)
    assert all(torch.equal(a, b) for a, b in zip(without, with_window, strict=True))
    shorter = prefix_attention(*inputs, DEEP, window=longest - 1)
    assert not torch.equal(without[0], shorter)
