"""The torch ops of preference_logratio: opcheck, compile, fake tensors, FLOPs and bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from fastpost_kernels import HeadRows, _kept_buffer, preference_logratio, workspace_bytes
from fastpost_kernels.preference_logratio import preference_logratio_bwd, preference_logratio_fwd
from tests.ops.test_linear_logprob_op import LiveBytes

OPS = {op._opoverload: op for op in (preference_logratio_fwd, preference_logratio_bwd)}
REFERENCES = ("shared", "own", "sums")
every_head = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
every_reference = pytest.mark.parametrize("ref", REFERENCES)


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


def arguments(
    rows: int = 6,
    width: int = 8,
    vocab: int = 70,
    *,
    ref: str = "shared",
    trained: bool = False,
    sequences: int = 4,
    dtype: torch.dtype = torch.float32,
    places: bool = False,
    masked: bool = False,
    with_bias: bool = True,
) -> tuple[HeadRows, HeadRows | Tensor, Tensor]:
    """policy, reference and cu_seqlens, sequences of almost equal lengths."""

    def head() -> tuple[Tensor, Tensor | None]:
        weight = torch.randn(vocab, width).to(dtype)
        return weight, torch.randn(vocab).to(dtype) if with_bias else None

    def targets() -> Tensor:
        drawn = torch.randint(0, vocab, (rows,))
        if masked:
            drawn[::7] = -100
        return drawn

    weight, bias = head()
    weight.requires_grad_(trained)
    if bias is not None:
        bias.requires_grad_(trained)
    count = 2 * rows if places else rows
    at = torch.arange(count) % rows if places else None
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    policy = HeadRows(hidden, weight, targets(), bias, at)
    cu_seqlens = torch.linspace(0, count, sequences + 1).long()
    if ref == "sums":
        return policy, torch.randn(sequences), cu_seqlens
    ref_weight, ref_bias = (weight, bias) if ref == "shared" else head()
    ref_hidden = torch.randn(rows, width).to(dtype)
    return policy, HeadRows(ref_hidden, ref_weight, targets(), ref_bias, at), cu_seqlens


def loss_of(*args: Any, **options: Any) -> Tensor:
    found = preference_logratio(*args, outputs=("entropy",), **options)
    return found.margins.sum() + found.mean_logps.sum() + found.logprob.square().sum()


def record(*args: Any, **options: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    with Recorder() as recorder:
        loss_of(*args, **options).backward()
    assert recorder.calls[0][0] is preference_logratio_fwd._opoverload
    return recorder.calls


@every_head
@every_reference
def test_opcheck(ref: str, trained: bool) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch of both ops."""
    calls = record(*arguments(ref=ref, trained=trained, places=trained))
    assert len(calls) == 2
    for func, call in calls:
        if "bwd" in str(func):  # runs without grad mode, on what the forward saved
            call = tree_map_only(Tensor, Tensor.detach, call)
        torch.library.opcheck(func, call)


@every_head
@every_reference
def test_compiles_as_one_graph(ref: str, trained: bool) -> None:
    args = arguments(ref=ref, trained=trained, places=True)
    leaves = [x for x in args[0] if isinstance(x, Tensor) and x.requires_grad]
    eager = torch.autograd.grad(loss_of(*args), leaves)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*args), leaves), eager, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_fake_tensors_flow_through() -> None:
    """A memory planner traces a head that would not fit, and the promise stays far below it."""
    with FakeTensorMode(), Recorder() as recorder:
        weight = torch.empty(151_936, 4096, dtype=torch.bfloat16)
        targets = torch.empty(8192, dtype=torch.int64)
        policy, ref = (
            HeadRows(torch.empty(8192, 4096, dtype=torch.bfloat16), weight, targets)
            for _ in range(2)
        )
        policy.hidden.requires_grad_()
        cu_seqlens = torch.empty(17, dtype=torch.int64)
        found = preference_logratio(policy, ref, cu_seqlens)
        assert found.margins.shape == (8,) and found.num_tokens.shape == (16,)
        found.margins.sum().backward()
        logits = 2 * 8192 * 151_936 * 2
        for func, call in recorder.calls:
            assert workspace_bytes(func, *call) < logits / 6
    assert policy.hidden.grad is not None and policy.hidden.grad.shape == (8192, 4096)


@every_head
@every_reference
@pytest.mark.parametrize("backend", ("torch", "cpp"))
def test_flop_formulas_count_what_runs(ref: str, trained: bool, backend: str) -> None:
    args = arguments(vocab=1100, ref=ref, trained=trained)
    for func, call in record(*args, backend=backend, memory_budget=9000):
        with FlopCounterMode(display=False) as promised:
            func(*call)
        with torch.no_grad(), FlopCounterMode(display=False) as executed:
            OPS[func]._init_fn(*call)
        assert promised.get_total_flops() == executed.get_total_flops()


@pytest.mark.parametrize(
    ("ref", "trained", "gemms"),
    [
        ("sums", False, 2),
        ("shared", False, 3),
        ("own", False, 3),
        ("sums", True, 4),
        ("shared", True, 5),
        ("own", True, 5),
    ],
)
def test_a_reference_costs_one_gemm(ref: str, trained: bool, gemms: int) -> None:
    args = arguments(vocab=1100, ref=ref, trained=trained)
    with FlopCounterMode(display=False) as counter:
        loss_of(*args).backward()
    assert counter.get_total_flops() == gemms * 2 * 6 * 8 * 1100


def measured_peak(func: Any, call: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes alive inside the op beyond its arguments and results."""
    monkeypatch.setattr(_kept_buffer, "_KEPT", {})  # allocated in the measured call, then kept
    with torch.no_grad(), LiveBytes(call) as live:
        results = OPS[func]._init_fn(*call)
        _kept_buffer._KEPT.clear()
    peak = live.peak - live.now
    del results
    return peak


@pytest.mark.parametrize("backend", ("torch", "cpp"))
@pytest.mark.parametrize(
    ("budget", "dtype"),
    [(1 << 19, torch.bfloat16), (64 << 20, torch.float32)],
    ids=["0.5MiB-bf16", "64MiB-fp32"],
)
@every_head
@every_reference
def test_workspace_formulas_bound_the_peak(
    ref: str,
    trained: bool,
    dtype: torch.dtype,
    budget: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured peak beyond results <= formula, and the formula is no empty promise."""
    args = arguments(256, 48, 4200, ref=ref, trained=trained, dtype=dtype, masked=True, places=True)
    for func, call in record(*args, backend=backend, memory_budget=budget):
        measured = measured_peak(func, call, monkeypatch)
        promised = workspace_bytes(func, *call)
        assert measured <= promised
        assert promised <= 3 * measured + (16 << 20)


@every_head
@every_reference
def test_peak_memory_grows_neither_with_vocabulary_nor_with_sequences(
    ref: str, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peaks(vocab: int, sequences: int) -> list[int]:
        args = arguments(
            256, 48, vocab, ref=ref, trained=trained, sequences=sequences, with_bias=False
        )
        calls = record(*args, backend="torch", memory_budget=1 << 19)
        return [measured_peak(func, call, monkeypatch) for func, call in calls]

    few = peaks(4096, 2)
    assert few == peaks(16_384, 2)
    for one, other in zip(few, peaks(4096, 256), strict=True):
        assert other - one <= 256 * 8 * 12  # numbers per sequence, beside megabytes


def test_unneeded_gradients_are_not_computed() -> None:
    """A frozen trunk under a trained head costs the weight's GEMM and the recomputed logits."""
    policy, ref, cu_seqlens = arguments(trained=True)
    policy.hidden.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        preference_logratio(policy, ref, cu_seqlens).margins.sum().backward()
    assert policy.hidden.grad is None and policy.weight.grad is not None
    assert counter.get_total_flops() == (1 + 1 + 2) * 2 * 6 * 8 * 70
