"""The torch ops around the kernels: opcheck, compile, fake tensors, FLOPs and bytes as promised."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from fastpost_kernels import (
    LoraHead,
    _kept_buffer,
    linear_cross_entropy,
    linear_logprob,
    workspace_bytes,
)
from fastpost_kernels._kept_buffer import release_kept_buffers
from fastpost_kernels.linear_cross_entropy import linear_cross_entropy_fwd
from fastpost_kernels.linear_logprob import linear_logprob_bwd, linear_logprob_fwd

OPS = {
    op._opoverload: op for op in (linear_logprob_fwd, linear_logprob_bwd, linear_cross_entropy_fwd)
}


def logprob_loss(
    h: Tensor, w: Tensor, t: Tensor, b: Tensor, lora: LoraHead | None, **options: Any
) -> Tensor:
    return linear_logprob(h, w, t, b, lora=lora, **options).logprob.sum()


def entropy_loss(
    h: Tensor, w: Tensor, t: Tensor, b: Tensor, lora: LoraHead | None, **options: Any
) -> Tensor:
    found = linear_logprob(h, w, t, b, lora=lora, outputs=("entropy", "logsumexp"), **options)
    assert found.entropy is not None and found.logsumexp is not None
    return found.entropy.sum() + found.logsumexp.sum()


def cross_entropy(
    h: Tensor, w: Tensor, t: Tensor, b: Tensor, lora: LoraHead | None, **options: Any
) -> Tensor:
    return linear_cross_entropy(h, w, t, b, lora=lora, **options).loss


LOSSES = (logprob_loss, entropy_loss, cross_entropy)


# What has gradients beside hidden; both of the last two put an adapter on the head.
MODES = ("frozen", "trained", "adapter", "frozen-adapter")


def tensors(
    rows: int, width: int, vocab: int, dtype: torch.dtype, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, LoraHead | None]:
    """hidden, weight, targets, bias, adapter; the bias is trained with the weight."""
    trained, lora = mode == "trained", None
    if "adapter" in mode:
        a, b = torch.randn(4, width).to(dtype), torch.randn(vocab, 4).to(dtype)
        lora = LoraHead(
            a.requires_grad_(mode == "adapter"), b.requires_grad_(mode == "adapter"), 0.5
        )
    return (
        torch.randn(rows, width).to(dtype).requires_grad_(),
        torch.randn(vocab, width).to(dtype).requires_grad_(trained),
        torch.randint(0, vocab, (rows,)),
        torch.randn(vocab).to(dtype).requires_grad_(trained),
        lora,
    )


class Recorder(TorchDispatchMode):
    """The calls of our ops, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in OPS:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Bytes of storages created inside and still alive: now, and at their peak."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.known = {
            x.untyped_storage()._cdata for x in tree_iter(arguments) if isinstance(x, Tensor)
        }

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                self.largest = max(self.largest, storage.nbytes())
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck(loss: Callable[..., Tensor], mode: str) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch of every op that runs."""
    args = tensors(6, 8, 70, torch.float32, mode)
    with Recorder() as recorder:
        loss(*args).backward()
    assert recorder.calls
    for func, call in recorder.calls:
        if "bwd" in str(func):  # runs without grad mode, on what the forward saved
            call = tree_map_only(Tensor, Tensor.detach, call)
        torch.library.opcheck(func, call)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_as_one_graph(loss: Callable[..., Tensor], mode: str) -> None:
    args = tensors(6, 8, 70, torch.float32, mode)
    leaves = [x for x in tree_iter(args) if isinstance(x, Tensor) and x.requires_grad]
    eager = torch.autograd.grad(loss(*args), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(torch.autograd.grad(compiled(*args), leaves), eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_fake_tensors_flow_through(loss: Callable[..., Tensor]) -> None:
    """A memory planner traces a head that would not fit: nothing is computed."""
    with FakeTensorMode():
        hidden = torch.empty(8192, 4096, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(151_936, 4096, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(151_936, dtype=torch.bfloat16)
        targets = torch.empty(8192, dtype=torch.int64)
        loss(hidden, weight, targets, bias, None).backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_flop_formulas_count_what_runs(
    loss: Callable[..., Tensor], mode: str, backend: str
) -> None:
    args = tensors(6, 8, 1100, torch.float32, mode)
    with Recorder() as recorder:
        loss(*args, backend=backend, memory_budget=9000).backward()
    for func, call in recorder.calls:
        with FlopCounterMode(display=False) as promised:
            func(*call)
        with torch.no_grad(), FlopCounterMode(display=False) as executed:
            OPS[func]._init_fn(*call)
        assert promised.get_total_flops() == executed.get_total_flops()


@pytest.mark.parametrize(
    ("loss", "mode", "gemms"),
    [
        (logprob_loss, "frozen", 2),
        (logprob_loss, "trained", 4),
        (entropy_loss, "frozen", 4),
        (cross_entropy, "frozen", 2),
        (cross_entropy, "trained", 3),
    ],
)
def test_strategies_cost_as_many_gemms_as_stated(
    loss: Callable[..., Tensor], mode: str, gemms: int
) -> None:
    args = tensors(6, 8, 1100, torch.float32, mode)
    with FlopCounterMode(display=False) as counter:
        loss(*args).backward()
    assert counter.get_total_flops() == gemms * 2 * 6 * 8 * 1100


@pytest.mark.parametrize(
    ("loss", "mode", "gemms", "thin"),
    [
        (logprob_loss, "frozen-adapter", 2, 2 * (1100 + 8)),
        # logits twice; G B for d hidden and d A; G^T u
        (logprob_loss, "adapter", 3, 2 * (1100 + 8) + (1100 + 2 * 8) + 1100),
        (cross_entropy, "adapter", 2, (1100 + 8) + (1100 + 2 * 8) + 1100),
    ],
)
def test_an_adapter_costs_thin_gemms_and_no_weight_gradient(
    loss: Callable[..., Tensor], mode: str, gemms: int, thin: int
) -> None:
    args = tensors(6, 8, 1100, torch.float32, mode)
    with FlopCounterMode(display=False) as counter:
        loss(*args).backward()
    rank = args[4].a.shape[0]
    assert counter.get_total_flops() == 2 * 6 * (gemms * 8 * 1100 + rank * thin)


@pytest.mark.parametrize("backend", ("torch", "cpp"))
@pytest.mark.parametrize("budget", [1 << 19, 64 << 20], ids=["0.5MiB", "64MiB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_workspace_formulas_bound_the_peak(
    loss: Callable[..., Tensor],
    mode: str,
    dtype: torch.dtype,
    budget: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured peak beyond results <= formula, and the formula is no empty promise."""
    args = tensors(256, 48, 4200, dtype, mode)
    args[2][::7] = -100
    with Recorder() as recorder:
        loss(*args, backend=backend, memory_budget=budget).backward()
    monkeypatch.setattr(_kept_buffer, "_KEPT", {})  # allocated in the measured call, then kept
    for func, call in recorder.calls:
        with torch.no_grad(), LiveBytes(call) as live:
            results = OPS[func]._init_fn(*call)
            _kept_buffer._KEPT.clear()
        measured = live.peak - live.now
        del results
        promised = workspace_bytes(func, *call)
        assert measured <= promised
        assert promised <= 3 * measured + (16 << 20)


@pytest.mark.parametrize("budget", [1 << 19, 64 << 20], ids=["0.5MiB", "64MiB"])
@pytest.mark.parametrize("mode", ["trained", "adapter"])
@pytest.mark.parametrize("loss", LOSSES)
def test_formulas_bound_a_filtered_call(
    loss: Callable[..., Tensor], mode: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of kept columns shares the budget; FLOPs are those of nothing dropped."""
    args = tensors(256, 48, 4200, torch.bfloat16, mode)
    options = {"backend": "torch", "memory_budget": budget, "filter_eps": 2.0**-3}
    with Recorder() as recorder:
        loss(*args, **options).backward()
    monkeypatch.setattr(_kept_buffer, "_KEPT", {})
    func, call = recorder.calls[-1]
    with FlopCounterMode(display=False) as promised:
        func(*call)
    with torch.no_grad(), FlopCounterMode(display=False) as executed, LiveBytes(call) as live:
        results = OPS[func]._init_fn(*call)
        _kept_buffer._KEPT.clear()
    measured = live.peak - live.now
    del results
    assert executed.get_total_flops() < promised.get_total_flops()
    assert measured <= workspace_bytes(func, *call) <= 3 * measured + (16 << 20)


def test_workspace_does_not_grow_with_rows_times_vocabulary() -> None:
    """The Qwen3-8B head at 8,192 tokens: 2.5 GB of logits, and less than a quarter of it held."""
    with FakeTensorMode(), Recorder() as recorder:
        hidden = torch.empty(8192, 4096, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(151_936, 4096, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.empty(8192, dtype=torch.int64)
        linear_logprob(hidden, weight, targets).logprob.sum().backward()
        linear_cross_entropy(hidden, weight, targets).loss.backward()
    logits = 8192 * 151_936 * 2
    assert len(recorder.calls) == 3
    for func, call in recorder.calls:
        assert workspace_bytes(func, *call) < logits / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["adapter", "frozen-adapter"])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_adapter_makes_nothing_of_the_heads_size(
    loss: Callable[..., Tensor], mode: str, dtype: torch.dtype
) -> None:
    """Neither W + s B A nor a gradient of W, nor a copy of either beside B."""
    vocab, width = 1100, 48
    args = tensors(16, width, vocab, dtype, mode)
    release_kept_buffers()  # another test's may be larger
    with Recorder() as recorder:
        loss(*args, memory_budget=1 << 16).backward()
    for func, call in recorder.calls:
        with torch.no_grad(), LiveBytes(call) as live:
            OPS[func]._init_fn(*call)
        assert live.largest < vocab * width * dtype.itemsize


def test_second_backward_and_private_statistics() -> None:
    """The graph can be used twice, and results may be overwritten before the backward."""
    hidden, weight, targets, bias, _ = tensors(6, 8, 70, torch.float32, "trained")
    found = linear_logprob(hidden, weight, targets, bias, outputs=("entropy", "logsumexp"))
    assert found.entropy is not None and found.logsumexp is not None
    loss = found.logprob.sum() + found.entropy.sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    with torch.no_grad():
        for values in (found.logprob, found.entropy, found.logsumexp):
            values.fill_(float("nan"))
    second = torch.autograd.grad(loss, [hidden, weight])
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_unneeded_gradients_are_not_computed() -> None:
    """Unused outputs reach the backward as None; unneeded inputs get no GEMM."""
    hidden, weight, targets, bias, _ = tensors(6, 8, 70, torch.float32, "trained")
    hidden.requires_grad_(False)
    bias.requires_grad_(False)
    with Recorder() as recorder, FlopCounterMode(display=False) as counter:
        linear_logprob(hidden, weight, targets, bias, outputs=("entropy",)).logprob.sum().backward()
    backward_args = recorder.calls[1][1]
    assert backward_args[1] is None and backward_args[2] is None
    assert hidden.grad is None and bias.grad is None and weight.grad is not None
    assert counter.get_total_flops() == 3 * 2 * 6 * 8 * 70
