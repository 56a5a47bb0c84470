"""Triton kernels write what they must and nothing else: guards, poison, the same bits twice.

The launches of whole ops are intercepted, so every buffer that a kernel gets is between guards, and
a launch can lose its last program. Tiles are small: each op has several in both directions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fastpost_kernels import _vocab_passes_triton as passes
from fastpost_kernels import _vocab_tiles, linear_logprob, prefix_attention
from fastpost_kernels.testing import Canary, guarded_call

prefix_host = importlib.import_module("fastpost_kernels._prefix_triton")

BF16, FP32 = torch.bfloat16, torch.float32
SEGMENTS = torch.tensor([[0, 18, 38], [18, 29, 36], [29, 30, 30], [30, 36, 36], [36, 38, 38]])
LOGPROB_KERNELS = {
    False: {"_linear_logprob_fold_kernel", "_linear_logprob_rescale_kernel"},
    True: {"_linear_logprob_fold_kernel", "_linear_logprob_gradient_kernel"},
}
ATTENTION_KERNELS = {
    "prefix_attention_fwd_kernel",
    "prefix_attention_bwd_query_kernel",
    "prefix_attention_bwd_key_kernel",
}

Run = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = dict.fromkeys(("forward", "grad_query", "grad_key"), (16, 16, 4, 1))
    monkeypatch.setattr(prefix_host, "choose_tiles", lambda *_: tiles)
    monkeypatch.setattr(_vocab_tiles, "TILE_COLS", 64)
    monkeypatch.setattr(_vocab_tiles, "MIN_COLS", 64)
    monkeypatch.setattr(passes, "GRADIENT_BLOCK", 32)
    monkeypatch.setattr(passes, "RESCALE_BLOCK", 16)


def logprob(dtype: torch.dtype, trained: bool, backend: str = "triton") -> list[Tensor]:
    """Outputs and gradients; logits far apart, so that a frozen head rescales its sums."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        (scale * torch.randn(*shape, generator=generator)).to(dtype)
        for shape, scale in (((7, 37), 3.0), ((150, 37), 3.0), ((150,), 1.0))
    )
    weight[140] = 2 * hidden[6]  # the last row meets its largest logit in the last tile
    targets = torch.tensor([0, 149, -100, 64, 128, 5, 77])
    leaves = [hidden, weight, bias] if trained else [hidden]
    for leaf in leaves:
        leaf.requires_grad_()
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "logsumexp")
    options: dict[str, Any] = {"softcap": 90.0, "temperature": 0.8} if trained else {}
    found = linear_logprob(hidden, weight, targets, bias, outputs=names, backend=backend, **options)
    loss = found.logprob.sum()
    if trained:
        assert found.entropy is not None
        loss = loss + found.entropy.sum()
    grads = torch.autograd.grad(loss, leaves)
    return [x.detach() for x in (*found, *grads) if x is not None]


def attention(dtype: torch.dtype, everything: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 24), (1, 24), (1, 20), (2, 20)]
    query, key, value, grad = (
        torch.randn(38, *shape, generator=generator).to(dtype).transpose(0, 1) for shape in shapes
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    options: dict[str, Any] = {}
    if everything:
        leaves.append(torch.randn(2, generator=generator).to(dtype).requires_grad_())
        options = {"window": 19, "softcap": 3.0, "sinks": leaves[3]}
    out = prefix_attention(query, key, value, SEGMENTS, backend="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


RUNS = [
    pytest.param(partial(logprob, trained=False), LOGPROB_KERNELS[False], id="logprob-frozen"),
    pytest.param(partial(logprob, trained=True), LOGPROB_KERNELS[True], id="logprob-trained"),
    pytest.param(partial(attention, everything=False), ATTENTION_KERNELS, id="attention"),
    pytest.param(partial(attention, everything=True), ATTENTION_KERNELS, id="attention-all"),
]
LAUNCHED = [
    pytest.param(*case.values, kernel, id=f"{case.id}-{kernel.strip('_')}")
    for case in (*RUNS[:2], RUNS[3])
    for kernel in sorted(case.values[1])
]


class Launches:
    """Launches of the interpreter, guarded, counted by kernel; one kernel may lose programs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, int] = {}
        self.drop_last_of = ""
        original = interpreter.GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            name = executor.fn.__name__
            self.counts[name] = self.counts.get(name, 0) + 1
            if name == self.drop_last_of:
                executor.grid = (executor.grid[0] - 1, *executor.grid[1:])
            guarded_call(partial(original, executor), *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Finite, and equal bit for bit."""
    for index, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert torch.isfinite(got).all(), f"result {index} is not finite"
        assert torch.equal(got, wanted), f"result {index} differs"


@triton.jit
def _copy_shifted_kernel(from_ptr, to_ptr, stride, n_cols, shift, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    x = tl.load(from_ptr + row * stride + offs, mask=offs < n_cols, other=0.0)
    tl.store(to_ptr + row * stride + offs + shift, x, mask=offs < n_cols)


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize(("shift", "caught"), [(0, False), (1, True), (-1, True)])
def test_one_element_outside_is_noticed(dtype: torch.dtype, shift: int, caught: bool) -> None:
    """Before the first row, after the last one, and between rows."""
    for rows in (slice(0, 1), slice(3, 4), slice(0, 4)):
        source = (torch.randn(4, 10) * 9).to(dtype)[rows, :8]
        target = torch.zeros(4, 10, dtype=dtype)[rows, :8]
        launch = _copy_shifted_kernel[(target.shape[0],)]
        call = partial(guarded_call, launch, source, target, 10, 8, shift, BLOCK=8)
        if caught:
            with pytest.raises(AssertionError, match="outside a buffer"):
                call()
        else:
            call()
            assert torch.equal(target, source)


def test_guards_scaled_in_place_are_noticed() -> None:
    """As a kernel does that reads, multiplies and writes one element too many."""
    canary = Canary(torch.randn(3, 5), strides=(5, 1))
    canary.buffer.mul_(0.5)
    with pytest.raises(AssertionError, match="outside a buffer"):
        canary.assert_untouched()


@pytest.mark.parametrize("strides", [(5, 1), (9, 1), (1, 3), (2, 7), (0, 1)], ids=str)
def test_any_strides_hold_the_values(strides: tuple[int, int]) -> None:
    tensor = torch.randn(1, 5).expand(3, 5) if 0 in strides else torch.randn(3, 5)
    canary = Canary(tensor, strides=strides)
    assert torch.equal(canary.inner, tensor) and canary.inner.stride() == strides
    canary.inner.as_strided((5,), strides[1:]).fill_(1.0)
    canary.assert_untouched()
    assert int(canary.is_guard.sum()) == canary.buffer.numel() - len(
        {i * strides[0] + j * strides[1] for i in range(3) for j in range(5)}
    )


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("run", "kernels"), RUNS)
def test_kernels_stay_inside_and_write_everything(
    run: Callable[[torch.dtype], list[Tensor]],
    kernels: set[str],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    """Guards around every buffer and NaN in fresh memory change no bit of any result."""
    torch.use_deterministic_algorithms(False)
    plain = run(dtype)
    torch.use_deterministic_algorithms(True, warn_only=True)
    launches = Launches(monkeypatch)
    assert_same(run(dtype), plain)
    assert set(launches.counts) == kernels


@pytest.mark.parametrize(("run", "kernels", "kernel"), LAUNCHED)
def test_a_program_that_does_not_run_is_noticed(
    run: Callable[[torch.dtype], list[Tensor]],
    kernels: set[str],
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    """The last block of each kernel in turn stays unwritten."""
    complete = run(FP32)
    launches = Launches(monkeypatch)
    launches.drop_last_of = kernel
    with pytest.raises(AssertionError, match="not finite" if "attention" in kernel else "result"):
        assert_same(run(FP32), complete)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("run", "kernels"), RUNS)
def test_two_runs_give_the_same_bits(
    run: Callable[[torch.dtype], list[Tensor]], kernels: set[str], dtype: torch.dtype
) -> None:
    """Also when what the first run left in memory is not what the second finds."""
    first = run(dtype)
    noise = [torch.full((5000,), torch.nan) for _ in range(20)]
    del noise
    assert_same(run(dtype), first)


def test_rescaling_stays_inside_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths around the block of 16, factors of one skipped, no gap between rows."""
    launches = Launches(monkeypatch)
    for width in (1, 15, 16, 17, 40):
        acc = torch.randn(4, width)
        factor = torch.tensor([0.5, 1.0, 3.0, 0.25])
        expected = acc * factor[:, None]
        passes.multiply_accumulate(acc, torch.zeros(4, 2), torch.zeros(2, width), None, factor)
        assert torch.equal(acc, expected)
    assert launches.counts == {"_linear_logprob_rescale_kernel": 5}
