"""Offsets past 2^31 elements: kernels over views whose strides are huge and whose pages are few.

The views lie in a sparse file: only the touched pages exist. An offset computed in 32 bits wraps to
another address, so that the result is wrong or the process ends.
"""

from __future__ import annotations

import importlib
import mmap
import tempfile
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from fastpost_kernels import _vocab_passes as passes_torch
from fastpost_kernels import _vocab_passes_triton as passes
from fastpost_kernels._prefix_regions import Scoring
from fastpost_kernels._vocab_passes import COEF_ROWS, STATE_ROWS, LogitTransform

prefix_host = importlib.import_module("fastpost_kernels._prefix_triton")
segments_module = importlib.import_module("fastpost_kernels._prefix_segments")
FAR = (1 << 30) + 64


class SparseMemory:
    """Far views one after the other in one file without data."""

    def __init__(self, flat: Tensor) -> None:
        self.flat, self.used = flat, 0

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        self.used += 1 << 12
        return self.flat.as_strided(shape, strides, self.used)


@pytest.fixture
def sparse() -> Iterator[SparseMemory]:
    size = 4 * (4 * FAR)
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
        yield SparseMemory(torch.frombuffer(memory, dtype=torch.float32))


def test_gradient_kernel(sparse: SparseMemory) -> None:
    tile = sparse.view((4, 40), (FAR, 1))
    tile.copy_(torch.randn(4, 40))
    exact, coefs, targets = tile.double(), torch.randn(COEF_ROWS, 4), torch.tensor([0, 1, 2, 3])
    coefs[0] += 12
    passes.gradient(tile, coefs, targets, 0, None, LogitTransform())
    passes_torch.gradient(exact, coefs.double(), targets, 0, None, LogitTransform())
    torch.testing.assert_close(tile.double(), exact, rtol=1e-5, atol=1e-6)


def test_significant_kernel(sparse: SparseMemory) -> None:
    tile = sparse.view((4, 40), (FAR, 1))
    tile.copy_(torch.randn(4, 40))
    factors = torch.tensor([0.5, 0.0, 0.3, 1.0])
    expected = ((tile * factors[:, None]).abs() > 1).any(0)
    assert 0 < expected.sum() < 40
    assert torch.equal(passes.significant(tile, factors), expected)


def test_fold_kernel(sparse: SparseMemory) -> None:
    tile = sparse.view((4, 40), (FAR, 1))
    tile.copy_(torch.randn(4, 40))
    exact, targets = tile.double(), torch.tensor([0, 1, 2, 3])
    state = torch.zeros(STATE_ROWS, 4)
    state[5:8] = -torch.inf
    exact_state = state.double()
    options = {"moments": True, "top1": True, "store_exp": True}
    passes.fold(tile, state, targets, 0, None, LogitTransform(), **options)
    passes_torch.fold(exact, exact_state, targets, 0, None, LogitTransform(), **options)
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tile.double(), exact, rtol=1e-5, atol=1e-6)


def test_rescale_kernel(sparse: SparseMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last four rows of a sum past 2^31 elements; the programs of the others are skipped."""
    cols = 1 << 13
    rows = (1 << 31) // cols + 4
    acc = sparse.view((rows, cols), (cols, 1))
    last, first = acc[-4:], acc[:4]
    last.copy_(torch.randn(4, cols))
    before = last.clone()
    factors = torch.ones(rows)
    factors[-4:] = torch.tensor([2.0, 1.0, 0.5, 3.0])
    at = interpreter_builder.set_grid_idx
    monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda *_: None)
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: at(rows - 4 + x, y, z))
    monkeypatch.setattr(interpreter_builder, "grid_dim", (rows, 1, 1))
    passes._linear_logprob_rescale_kernel[(4,)](acc, factors, cols, BLOCK_N=4096)
    assert torch.equal(last, before * factors[-4:, None])
    assert not first.any()


@pytest.mark.parametrize("far", ["heads", "tokens"])
def test_attention_kernels(far: str, sparse: SparseMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, output and gradients all apart by heads, or by tokens; the same bits as nearby."""
    tiles = dict.fromkeys(("forward", "grad_query", "grad_key"), (16, 16, 4, 1))
    monkeypatch.setattr(prefix_host, "choose_tiles", lambda *_: tiles)
    segments = torch.tensor([[0, 2, 4], [2, 4, 4]])
    heads = 4 if far == "heads" else 1
    near = [torch.randn(heads, 4, 16) for _ in range(4)]
    strides = (FAR, 16, 1) if far == "heads" else (16, FAR, 1)

    schedule, scoring = segments_module.schedule_of(segments, 4), Scoring(0.25, None, None)

    def results(tensors: list[Tensor]) -> list[Tensor]:
        query, key, value, grad_out = tensors
        out, lse = prefix_host.forward_triton(query, key, value, None, schedule, scoring)
        grads = prefix_host.backward_triton(
            grad_out, query, key, value, out, lse, schedule, scoring
        )
        return [out, *grads]

    expected = results(near)
    moved = [sparse.view((heads, 4, 16), strides).copy_(x) for x in near]
    monkeypatch.setattr(
        prefix_host, "_empty_like", lambda x, size: sparse.view((heads, 4, size), strides)
    )
    for got, wanted in zip(results(moved), expected, strict=True):
        assert got.stride() == strides and torch.equal(got, wanted)
