"""The checks of kernels, in the interpreter: they pass, and a broken kernel fails them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost.doctor import attention_checks, layer_checks
from fastpost.doctor.guarded_memory import BAND, GuardedMemory
from fastpost.doctor.kernel_check import carry_out
from fastpost.doctor.kernel_checks import CheckResult, Sizes, run_checks

host = importlib.import_module("fastpost_kernels._prefix_triton")

TINY = Sizes(
    rows=13,
    width=32,
    vocab=263,
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


def attention_results() -> list[CheckResult]:
    checks = attention_checks.attention_checks(torch.float32, TINY, "triton")
    return [carry_out(check, torch.device("cpu")) for check in checks]


def layer_results() -> list[CheckResult]:
    checks = layer_checks.layer_checks(torch.float32, TINY)
    return [carry_out(check, torch.device("cpu")) for check in checks]


def test_sound_kernels_pass() -> None:
    results = list(run_checks("cpu", TINY, backend="triton"))
    assert [r for r in results if not r.ok] == []
    assert len(results) == len({(r.op, r.form, r.dtype, r.shape) for r in results}) == 2 * 19
    assert {r.op for r in results} == {
        "linear_logprob",
        "linear_cross_entropy",
        "prefix_attention",
        "rms_norm",
        "swiglu",
        "linear",
        "lora_linear",
        "dora_linear",
        "nf4_linear",
        "adamw_8bit",
    }
    assert all(r.worst and 0 < r.error <= r.tolerance < 0.5 for r in results)


def sabotage(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    sound = attention_checks.prefix_attention

    def broken(**given: Any) -> Tensor:
        return spoil(sound(**given), given)

    monkeypatch.setattr(attention_checks, "prefix_attention", broken)


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
    results = attention_results()
    assert results and not any(r.ok for r in results)
    assert all(fault in str(r.fault) for r in results)


def past_the_end(x: Tensor) -> Tensor:
    """The element that follows the last one of `x` in memory."""
    x = x.data  # outside the version counter, as a kernel is
    return x.as_strided((1,), (1,), x.storage_offset() + x.numel())[0]


def spoil_band(out: Tensor, x: Tensor) -> Tensor:
    past_the_end(x).fill_(float("nan"))
    return out


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "linear"])
def test_a_broken_layer_fails(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = getattr(layer_checks, op)
    monkeypatch.setattr(layer_checks, op, lambda *args, **given: 1.0001 * sound(*args, **given))
    results = {r.op: r for r in layer_results()}
    assert "further from the reference" in str(results.pop(op).fault)
    assert all(r.ok for r in results.values())


def test_a_kernel_that_leaves_a_block_unwritten_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = host._query_table

    def without_last_block(*args: Any) -> tuple[Tensor, Tensor]:
        blocks, ranges = sound(*args)
        return blocks[:-1], ranges

    monkeypatch.setattr(host, "_query_table", without_last_block)
    results = attention_results()
    assert results and all("NaN" in str(r.fault) for r in results)


def test_buffers_made_inside_ops_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: what the launchers allocate starts as NaN, between bands."""
    fresh, made = host._empty_like, []

    def seen(x: Tensor, size: int) -> Tensor:
        made.append(fresh(x, size))
        assert made[-1].isnan().all()
        assert made[-1].untyped_storage().nbytes() > 2 * BAND
        return made[-1]

    monkeypatch.setattr(host, "_empty_like", seen)
    assert all(r.ok for r in attention_results())
    assert len(made) == 2 * 4  # out, dQ, dK and dV of both forms


def test_guarded_tensors_keep_shape_and_values() -> None:
    memory = GuardedMemory()
    x = torch.randn(3, 4).t()
    assert torch.equal(memory.guard(x), x) and memory.guard(x).stride() == x.stride()
    with memory:
        assert torch.equal(torch.zeros(3), torch.tensor([0.0, 0.0, 0.0]))
        assert torch.empty(5, dtype=torch.bfloat16).isnan().all()
    assert memory.is_untouched()
