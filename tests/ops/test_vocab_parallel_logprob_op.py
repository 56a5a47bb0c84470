"""The ops of vocab_parallel_logprob in a group of one: opcheck, compile, costs as promised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from fastpost_kernels import linear_logprob, vocab_parallel_logprob, workspace_bytes
from fastpost_kernels._vocab_agreement import ROW_WORDS
from fastpost_kernels.vocab_parallel_logprob import (
    vocab_parallel_logprob_bwd,
    vocab_parallel_logprob_fwd,
)
from tests.ops.test_linear_logprob_op import LiveBytes

OPS = {op._opoverload: op for op in (vocab_parallel_logprob_fwd, vocab_parallel_logprob_bwd)}
Loss = Callable[..., Tensor]


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    """One process: every collective runs, and changes nothing."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def logprob_loss(group: Any, h: Tensor, w: Tensor, t: Tensor, b: Tensor, **options: Any) -> Tensor:
    place = {"vocab_start": 0, "vocab_size": len(w)} | options
    return vocab_parallel_logprob(h, w, t, group, bias_shard=b, **place).logprob.sum()


def entropy_loss(group: Any, h: Tensor, w: Tensor, t: Tensor, b: Tensor, **options: Any) -> Tensor:
    place = {"vocab_start": 0, "vocab_size": len(w)} | options
    asked = ("entropy", "logsumexp", "is_top1")
    found = vocab_parallel_logprob(h, w, t, group, bias_shard=b, outputs=asked, **place)
    assert found.entropy is not None and found.logsumexp is not None
    return found.entropy.sum() + found.logsumexp.sum()


LOSSES = (logprob_loss, entropy_loss)


def tensors(
    rows: int, width: int, vocab: int, trained: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets, bias; the bias is trained with the weight."""
    return (
        torch.randn(rows, width).to(dtype).requires_grad_(),
        torch.randn(vocab, width).to(dtype).requires_grad_(trained),
        torch.randint(0, vocab, (rows,)),
        torch.randn(vocab).to(dtype).requires_grad_(trained),
    )


class Recorder(TorchDispatchMode):
    """The calls of our ops, and the (kind, bytes) of the collectives in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.collectives: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in OPS:
            self.calls.append((func, args))
        if func.namespace == "_c10d_functional" and "wait" not in str(func):
            kind = args[1] if isinstance(args[1], str) else "gather"
            self.collectives.append((kind, args[0].numel() * args[0].itemsize))
        return func(*args, **(kwargs or {}))


def recorded(loss: Loss, group: Any, *args: Tensor, **options: Any) -> list[tuple[Any, Any]]:
    with Recorder() as recorder:
        loss(group, *args, **options).backward()
    assert recorder.calls
    return recorder.calls


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck(loss: Loss, trained: bool, group) -> None:
    for func, call in recorded(loss, group, *tensors(6, 8, 70, trained)):
        if "bwd" in str(func):  # runs without grad mode, on what the forward saved
            call = tree_map_only(Tensor, Tensor.detach, call)
        torch.library.opcheck(func, call)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_compiles_as_one_graph(trained: bool, group) -> None:
    args = tensors(6, 8, 70, trained)
    leaves = [x for x in args if x.requires_grad]
    eager = torch.autograd.grad(entropy_loss(group, *args), leaves)
    compiled = torch.compile(entropy_loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        torch.autograd.grad(compiled(group, *args), leaves), eager, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_group_of_one_is_linear_logprob(trained: bool, group) -> None:
    hidden, weight, targets, bias = tensors(40, 8, 1100, trained)
    asked = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "logsumexp")
    ours = vocab_parallel_logprob(
        hidden, weight, targets, group, vocab_start=0, vocab_size=1100, bias_shard=bias,
        outputs=asked,
    )  # fmt: skip
    alone = linear_logprob(hidden, weight, targets, bias, outputs=asked)
    for one, other in zip(ours, alone, strict=True):
        assert torch.equal(one, other)
    leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
    seeds = torch.randn(40)
    for one, other in zip(
        torch.autograd.grad((ours.logprob * seeds).sum(), leaves),
        torch.autograd.grad((alone.logprob * seeds).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_fake_tensors_flow_through_without_communication(loss: Loss) -> None:
    """A memory planner traces one of eight ranks: the group does not exist."""
    nowhere = SimpleNamespace(group_name="no such group", size=lambda: 8)
    vocab = 151_936
    with FakeTensorMode(), Recorder() as recorder:
        hidden = torch.empty(8192, 4096, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocab // 8, 4096, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(vocab // 8, dtype=torch.bfloat16)
        targets = torch.empty(8192, dtype=torch.int64)
        loss(nowhere, hidden, weight, targets, bias, vocab_size=vocab).backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert weight.grad is not None and weight.grad.shape == weight.shape
    assert len(recorder.calls) == 2 and not recorder.collectives
    for func, call in recorder.calls:
        assert workspace_bytes(func, *call) < 8192 * vocab * 2 / 3


@pytest.mark.parametrize("backend", ("torch", "cpp"))
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("loss", LOSSES)
def test_flop_formulas_count_what_runs(loss: Loss, trained: bool, backend: str, group) -> None:
    args = tensors(6, 8, 1100, trained)
    for func, call in recorded(loss, group, *args, backend=backend, memory_budget=9000):
        with FlopCounterMode(display=False) as promised:
            func(*call)
        with torch.no_grad(), FlopCounterMode(display=False) as executed:
            OPS[func]._init_fn(*call)
        assert promised.get_total_flops() == executed.get_total_flops()


@pytest.mark.parametrize(
    ("loss", "trained", "gemms"),
    [(logprob_loss, False, 2), (logprob_loss, True, 4), (entropy_loss, False, 4)],
)
def test_strategies_cost_as_many_gemms_as_stated(
    loss: Loss, trained: bool, gemms: int, group
) -> None:
    with FlopCounterMode(display=False) as counter:
        loss(group, *tensors(6, 8, 1100, trained)).backward()
    assert counter.get_total_flops() == gemms * 2 * 6 * 8 * 1100


@pytest.mark.parametrize("backend", ("torch", "cpp"))
@pytest.mark.parametrize("budget", [1 << 19, 64 << 20], ids=["0.5MiB", "64MiB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("loss", LOSSES)
def test_workspace_formulas_bound_the_peak(
    loss: Loss, trained: bool, dtype: torch.dtype, budget: int, backend: str, group
) -> None:
    """Measured peak beyond results <= formula, and the formula is no empty promise."""
    hidden, weight, targets, bias = tensors(256, 48, 4200, trained, dtype)
    targets[::7] = -100
    options = {"backend": backend, "memory_budget": budget}
    for func, call in recorded(loss, group, hidden, weight, targets, bias, **options):
        with torch.no_grad(), LiveBytes(call) as live:
            results = OPS[func]._init_fn(*call)
        measured = live.peak - live.now
        del results
        promised = workspace_bytes(func, *call)
        assert measured <= promised
        assert promised <= 3 * measured + (16 << 20)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("everything", [False, True], ids=["logprob", "everything"])
def test_communicates_what_the_docstring_states(everything: bool, trained: bool, group) -> None:
    """Rows that are not scored are not communicated; two chunks of rows."""
    hidden, weight, targets, bias = tensors(6000, 8, 70, trained)
    targets[::6] = -100  # 5,000 are left
    loss = entropy_loss if everything else logprob_loss
    with Recorder() as outside:
        loss(group, hidden, weight, targets, bias).backward()
    expected = [("gather", 8 * ROW_WORDS)]
    for m in (4096, 904):
        expected += [("sum", 2 * 4 * m), ("max", (4 if everything else 1) * 4 * m)]
        expected += [("sum", (4 if everything else 1) * 4 * m)]
        expected += [] if trained else [("sum", 4 * m * 8)]
    if trained or everything:
        expected.append(("sum", 4 * 5000 * 8))
    assert ROW_WORDS == 18
    for func, call in outside.calls:
        with torch.no_grad(), outside:
            OPS[func]._init_fn(*call)
    assert outside.collectives == expected


def test_second_backward_and_private_statistics(group) -> None:
    """The graph can be used twice, and results may be overwritten before the backward."""
    hidden, weight, targets, _ = tensors(6, 8, 70, True)
    found = vocab_parallel_logprob(
        hidden, weight, targets, group, vocab_start=0, vocab_size=70, outputs=("entropy",)
    )
    assert found.entropy is not None
    loss = found.logprob.sum() + found.entropy.sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    with torch.no_grad():
        for values in (found.logprob, found.entropy):
            values.fill_(float("nan"))
    second = torch.autograd.grad(loss, [hidden, weight])
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_no_gradient_asked_for_is_one_gemm_and_no_row_of_hidden_communicated(group) -> None:
    hidden, weight, targets, bias = tensors(6, 8, 1100, True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, Recorder() as outside:
        logprob_loss(group, hidden, weight, targets, bias)
        for func, call in list(outside.calls):
            OPS[func]._init_fn(*call)
    assert counter.get_total_flops() == 2 * (2 * 6 * 8 * 1100)
    assert max(size for kind, size in outside.collectives if kind != "gather") <= 2 * 4 * 6


def test_the_gradient_of_hidden_alone_keeps_the_head_out(group) -> None:
    """A trained bias with a frozen weight gets its own gradient and no d weight."""
    hidden, weight, targets, bias = tensors(6, 8, 70, True)
    weight.requires_grad_(False)
    logprob_loss(group, hidden, weight, targets, bias).backward()
    assert weight.grad is None and hidden.grad is not None and bias.grad is not None
    linear = linear_logprob(hidden, weight, targets, bias).logprob.sum()
    d_bias = torch.autograd.grad(linear, bias)[0]
    torch.testing.assert_close(bias.grad, d_bias)
