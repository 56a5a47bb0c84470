"""The checks of kernels, in the interpreter: they pass, and a broken kernel fails them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost.doctor import kernel_checks
from fastpost.doctor.guarded_memory import BAND, GuardedMemory
from fastpost.doctor.kernel_checks import CheckResult, Sizes, run_checks

host = importlib.import_module("fastpost_kernels._prefix_triton")

TINY = Sizes(
    rows=13,
    width=32,
    vocab=521,
    memory_budget=1 << 14,
    head_sizes=(16,),
    heads=(2, 1),
    segments=((0, 20, 41), (20, 33, 33), (33, 41, 41)),
    window=9,
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = dict.fromkeys(("forward", "grad_query", "grad_key"), (32, 16, 4, 1))
    monkeypatch.setattr(host, "choose_tiles", lambda *_: tiles)


@pytest.fixture
def only_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "DTYPES", (torch.float32,))


def attention_checks() -> list[CheckResult]:
    checks = run_checks("cpu", TINY, backend="triton")
    return [check for check in checks if check.op == "prefix_attention"]


def test_sound_kernels_pass() -> None:
    results = list(run_checks("cpu", TINY, backend="triton"))
    assert [r for r in results if not r.ok] == []
    assert len(results) == len({(r.op, r.form, r.dtype, r.shape) for r in results}) == 2 * 10
    assert {r.op for r in results} == {
        "linear_logprob",
        "linear_cross_entropy",
        "prefix_attention",
    }
    assert all(r.worst and 0 < r.error <= r.tolerance < 0.5 for r in results)


def sabotage(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    sound = kernel_checks.prefix_attention

    def broken(**given: Any) -> Tensor:
        return spoil(sound(**given), given)

    monkeypatch.setattr(kernel_checks, "prefix_attention", broken)


@pytest.mark.usefixtures("only_fp32")
@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda out, _: out * (1 + 1e-4), "further from the reference"),
        (lambda out, _: out + torch.empty_like(out), "holds NaN"),
        (lambda out, given: out + 0 * past_the_end(given["query"]), "holds NaN"),
        (lambda out, given: spoil_band(out, given["key"]), "wrote outside"),
        (lambda out, _: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["wrong", "unwritten", "read-outside", "wrote-outside", "raises"],
)
def test_a_broken_kernel_fails(monkeypatch: pytest.MonkeyPatch, spoil: Any, fault: str) -> None:
    sabotage(monkeypatch, spoil)
    results = attention_checks()
    assert results and not any(r.ok for r in results)
    assert all(fault in str(r.fault) for r in results)


def past_the_end(x: Tensor) -> Tensor:
    """The element that follows the last one of `x` in memory."""
    x = x.data  # outside the version counter, as a kernel is
    return x.as_strided((1,), (1,), x.storage_offset() + x.numel())[0]


def spoil_band(out: Tensor, x: Tensor) -> Tensor:
    past_the_end(x).fill_(float("nan"))
    return out


@pytest.mark.usefixtures("only_fp32")
def test_a_kernel_that_leaves_a_block_unwritten_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = host._query_table

    def without_last_block(*args: Any) -> tuple[Tensor, Tensor]:
        blocks, ranges = sound(*args)
        return blocks[:-1], ranges

    monkeypatch.setattr(host, "_query_table", without_last_block)
    results = attention_checks()
    assert results and all("NaN" in str(r.fault) for r in results)


@pytest.mark.usefixtures("only_fp32")
def test_buffers_made_inside_ops_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: what the launchers allocate starts as NaN, between bands."""
    fresh, made = host._empty_like, []

    def seen(x: Tensor, size: int) -> Tensor:
        made.append(fresh(x, size))
        assert made[-1].isnan().all()
        assert made[-1].untyped_storage().nbytes() > 2 * BAND
        return made[-1]

    monkeypatch.setattr(host, "_empty_like", seen)
    assert all(r.ok for r in attention_checks())
    assert len(made) == 2 * 4  # out, dQ, dK and dV of both forms


def test_guarded_tensors_keep_shape_and_values() -> None:
    memory = GuardedMemory()
    x = torch.randn(3, 4).t()
    assert torch.equal(memory.guard(x), x) and memory.guard(x).stride() == x.stride()
    with memory:
        assert torch.equal(torch.zeros(3), torch.tensor([0.0, 0.0, 0.0]))
        assert torch.empty(5, dtype=torch.bfloat16).isnan().all()
    assert memory.is_untouched()
