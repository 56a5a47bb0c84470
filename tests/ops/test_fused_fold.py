"""Statistics of logits that are never stored, against the torch pass in float64.

Blocks are small, so that a few rows and columns already give several of each; both ways to load
them run, the tensor memory accelerator's as its interpreter has it.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from fastpost_kernels import _fused_fold_triton as fused
from fastpost_kernels import _vocab_passes as passes_torch
from fastpost_kernels import _vocab_tiles, linear_cross_entropy, linear_logprob, reference
from fastpost_kernels._choices import override
from fastpost_kernels._fused_fold_triton import Blocks, split_vocabulary
from fastpost_kernels._vocab_passes import RESCALE, STATE_ROWS, LogitTransform
from fastpost_kernels.testing import Canary, assert_close_to_reference, guarded_call

BF16, FP32 = torch.bfloat16, torch.float32
PLAIN, TRANSFORMED = LogitTransform(), LogitTransform(1.3, 5.0, 0.7)
SMALL = Blocks(16, 16, 16, 4, 2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "choose_blocks", lambda *_: SMALL)
    monkeypatch.setattr(fused, "GROUP_ROWS", 2)
    monkeypatch.setattr(fused, "HALVINGS", 1)
    monkeypatch.setattr(fused, "_processors", lambda _: 1)


@pytest.fixture(params=[0, 90], ids=["pointers", "tma"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(fused, "capability", lambda _: request.param)
    # rows of a few elements count as whole blocks
    monkeypatch.setattr(
        fused, "_is_aligned", lambda x: (x.data_ptr() | x.stride(0) * x.itemsize) % 16 == 0
    )
    return int(request.param)


def head_of(rows: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of about 4."""
    return (
        (4 * torch.randn(rows, width) / width**0.5).to(dtype),
        torch.randn(vocab, width).to(dtype),
    )


def state_of(rows: int) -> Tensor:
    state = torch.zeros(STATE_ROWS, rows)
    state[0] = torch.randn(rows)
    state[5:8] = -torch.inf
    return state


def scratch_of(rows: int, vocab: int) -> Tensor:
    """NaN, of the size that a tile of logits has."""
    return torch.full((rows, -(-vocab // 64) * 64), torch.nan, dtype=BF16)


def true_fold(hidden: Tensor, weight: Tensor, state: Tensor, *args: Any, **flags: bool) -> Tensor:
    """The state after the torch pass over the whole product in float64."""
    logits = hidden.double() @ weight.double().T
    targets, first, bias, transform = args
    exact = state.double()
    bias = None if bias is None else bias.double()
    passes_torch.fold(logits, exact, targets, first, bias, transform, store_exp=False, **flags)
    return exact


def assert_same_state(actual: Tensor, exact: Tensor, cols: int) -> None:
    """Sums of logits of both signs cancel: an absolute error of half a unit per term."""
    kept = [row for row in range(STATE_ROWS) if row != RESCALE]
    torch.testing.assert_close(
        actual[kept].double(), exact[kept], rtol=5e-6, atol=1e-5 + 1e-7 * cols
    )


@pytest.mark.parametrize("transform", [PLAIN, TRANSFORMED], ids=["plain", "transformed"])
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "dtype", "moments", "top1"),
    [
        (5, 24, 33, BF16, True, True),
        (33, 16, 50, FP32, True, True),
        (1, 8, 1, BF16, True, True),
        (16, 40, 32, BF16, False, False),
        (17, 13, 15, FP32, True, False),
        (16, 16, 17, BF16, False, True),
    ],
)
def test_fold_equals_torch_and_stays_inside(
    rows: int,
    width: int,
    vocab: int,
    dtype: torch.dtype,
    moments: bool,
    top1: bool,
    transform: LogitTransform,
    loads: int,
) -> None:
    """Guards around every buffer survive; scratch starts as NaN."""
    hidden, weight = head_of(rows, width, vocab, dtype)
    targets = 100 + torch.randint(-1, vocab + 1, (rows,))
    bias = torch.randn(vocab) if transform is TRANSFORMED else None
    flags = {"moments": moments, "top1": top1}
    state = state_of(rows)
    exact = true_fold(hidden, weight, state, targets, 100, bias, transform, **flags)
    # rows one element past 16 bytes apart where the accelerator does not read them
    apart = width + 8 if loads else width + 1
    buffers = [
        Canary(hidden, strides=(apart, 1)),
        Canary(weight, strides=(apart, 1)),
        Canary(state),
        Canary(targets),
        Canary(scratch_of(rows, vocab), strides=(-(-vocab // 64) * 64, 1)),
    ]
    inner = [buffer.inner for buffer in buffers]
    fused.fold_products(*inner[:4], 100, bias, transform, inner[4], **flags)
    assert_same_state(inner[2], exact, vocab)
    for buffer in buffers:
        buffer.assert_untouched()


def test_tma_is_used_where_it_can_read(loads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = interpreter.GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        if "USE_TMA" in kwargs:
            seen.append(kwargs["USE_TMA"])
        original(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    for dtype, width in ((BF16, 16), (BF16, 12), (FP32, 16)):
        hidden, weight = head_of(3, width, 20, dtype)
        targets, scratch = torch.zeros(3, dtype=torch.int64), scratch_of(3, 20)
        fused.fold_products(
            hidden, weight, state_of(3), targets, 0, None, PLAIN, scratch, moments=True, top1=True
        )
    assert seen == [loads == 90, False, False]


@pytest.mark.parametrize("per_range", [1, 3])
def test_every_split_of_the_vocabulary_gives_the_statistics(
    per_range: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each gives the same bits twice, whatever scratch held."""
    monkeypatch.setattr(fused, "split_vocabulary", lambda *_: per_range)
    hidden, weight = head_of(33, 16, 70, FP32)
    targets, before = torch.randint(0, 70, (33,)), state_of(33)
    hidden[:, 0] = 0
    hidden[3, 0], weight[60, 0] = 1, 60  # one logit far above the others: the reference moves
    exact = true_fold(hidden, weight, before, targets, 0, None, PLAIN, moments=True, top1=True)
    found = []
    for fill in (torch.nan, 3.0):
        state, scratch = before.clone(), scratch_of(33, 70).fill_(fill)
        fused.fold_products(
            hidden, weight, state, targets, 0, None, PLAIN, scratch, moments=True, top1=True
        )
        found.append(state)
    assert exact[0, 3] > before[0, 3] + 30
    # the references of a moved row are maxima of other blocks, so its sums are compared as results
    still = exact[0] == before[0].double()
    assert_same_state(found[0][:, still], exact[:, still], 70)
    log_sums = [s[0].double() + s[1].double().log() for s in (found[0], exact)]
    torch.testing.assert_close(*log_sums, rtol=1e-5, atol=1e-5)
    assert torch.equal(*found)


def test_parts_of_the_vocabulary_one_after_the_other_are_the_whole() -> None:
    """As ranges of tiles, or the shards of a head: the state is merged, not replaced."""
    hidden, weight = head_of(20, 16, 50, FP32)
    targets, whole = torch.randint(0, 50, (20,)), state_of(20)
    parts = whole.clone()
    flags = {"moments": True, "top1": True}
    exact = true_fold(hidden, weight, whole, targets, 0, None, PLAIN, **flags)
    for first, last in ((0, 21), (21, 23), (23, 50)):
        scratch = scratch_of(20, last - first)
        piece = weight[first:last]
        fused.fold_products(hidden, piece, parts, targets, first, None, PLAIN, scratch, **flags)
    assert_same_state(parts, exact, 50)


def test_nan_stays_in_its_row() -> None:
    hidden, weight = head_of(20, 16, 50, FP32)
    hidden[7, 3] = torch.nan
    targets, state = torch.randint(0, 50, (20,)), state_of(20)
    state[0, 7] = torch.nan
    fused.fold_products(
        hidden, weight, state, targets, 0, None, PLAIN, scratch_of(20, 50), moments=True, top1=True
    )
    bad = state[:5].isnan().any(0)
    assert bad[7] and state[:2, 7].isnan().all() and int(bad.sum()) == 1


def test_nothing_to_fold() -> None:
    state = state_of(0)
    empty = torch.empty(0, 16), torch.empty(30, 16)
    targets, scratch = torch.empty(0, dtype=torch.int64), torch.empty(0, 64)
    fused.fold_products(*empty, state, targets, 0, None, PLAIN, scratch, moments=True, top1=True)
    assert state.shape == (STATE_ROWS, 0)


def test_a_program_that_does_not_run_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both kernels: its part of the NaN stays, or its rows keep the old state."""
    original = interpreter.GridExecutor.__call__
    hidden, weight = head_of(20, 16, 50, FP32)
    targets, before = torch.randint(0, 50, (20,)), state_of(20)

    def run(drop: str) -> Tensor:
        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            if drop in executor.fn.__name__:
                executor.grid = (executor.grid[0] - 1, *executor.grid[1:])
            guarded_call(partial(original, executor), *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
        state = before.clone()
        fused.fold_products(
            hidden, weight, state, targets, 0, None, PLAIN, scratch_of(20, 50),
            moments=True, top1=True,
        )  # fmt: skip
        return state

    exact = true_fold(hidden, weight, before, targets, 0, None, PLAIN, moments=True, top1=True)
    assert_same_state(run("nothing"), exact, 50)
    for drop in ("fused_fold", "merge"):
        with pytest.raises(AssertionError):
            assert_same_state(run(drop), exact, 50)


def test_rows_past_two_to_the_31() -> None:
    """Rows of the head 2^30 + 64 elements apart in a sparse file: only touched pages exist."""
    stride, vocab, width = (1 << 30) + 64, 4, 24
    size = 4 * (stride * (vocab - 1) + width)
    hidden, near = head_of(3, width, vocab, FP32)
    targets, state, expected = torch.tensor([0, 3, 2]), state_of(3), None
    expected = state.clone()
    flags = {"moments": True, "top1": True}
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
        far = torch.frombuffer(memory, dtype=FP32).as_strided((vocab, width), (stride, 1))
        far.copy_(near)
        for weight, into in ((near, expected), (far, state)):
            fused.fold_products(
                hidden, weight, into, targets, 0, None, PLAIN, scratch_of(3, vocab), **flags
            )
        assert torch.equal(state, expected)
        del far, weight


@pytest.mark.parametrize(
    ("row_blocks", "vocab_blocks", "limit", "expected"),
    [
        (32, 501, 500, 8),  # M 4096, V 128,256: many programs, ranges of full length
        (2, 501, 512, 1),  # few rows: every program counts
        (2, 501, 100, 6),  # but partial states must fit
        (1, 5000, 10_000, 10),  # and the merge holds 512 of them
        (1, 1, 1, 1),
    ],
)
def test_split_of_the_vocabulary(
    row_blocks: int, vocab_blocks: int, limit: int, expected: int
) -> None:
    assert split_vocabulary(row_blocks, vocab_blocks, 132, limit) == expected
    assert -(-vocab_blocks // expected) <= min(limit, fused.MAX_RANGES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Vocabulary sizes of the fused folds of this test."""
    seen: list[int] = []
    original = fused.fold_products

    def spied(hidden: Tensor, weight: Tensor, *args: Any, **flags: bool) -> None:
        seen.append(weight.shape[0])
        original(hidden, weight, *args, **flags)

    monkeypatch.setattr(fused, "fold_products", spied)
    monkeypatch.setattr(_vocab_tiles, "TILE_COLS", 64)
    monkeypatch.setattr(_vocab_tiles, "MIN_COLS", 64)
    yield seen


VALUES = ("logprob", "entropy", "log_sum_sq_probs", "mean_logits", "logsumexp")


def trained_head(
    inputs: tuple[Tensor, ...], targets: Tensor, backend: str | None
) -> dict[str, Tensor]:
    """Values and gradients of a head that is trained."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    hidden, weight, bias = leaves
    options: dict[str, Any] = {"temperature": 0.7, "softcap": 5.0}
    if backend is None:
        found = reference.linear_logprob(hidden, weight, targets, bias, **options)
    else:
        options |= {"outputs": (*VALUES[1:], "is_top1"), "backend": backend}
        found = linear_logprob(hidden, weight, targets, bias, **options)._asdict()
    loss = found["logprob"].sum() + found["entropy"].sum()
    grads = torch.autograd.grad(loss, leaves)
    results = {name: found[name].detach() for name in VALUES}
    return results | dict(zip(("d hidden", "d weight", "d bias"), grads, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_trained_head_with_the_fused_fold(dtype: torch.dtype, calls: list[int]) -> None:
    hidden, weight = head_of(21, 24, 150, dtype)
    inputs = (hidden, weight, torch.randn(150).to(dtype))
    targets = torch.randint(0, 150, (21,))
    targets[::5] = -100
    with override({"head_fold": "fused"}):
        actual = trained_head(inputs, targets, "triton")
    assert calls == [150]
    truth = trained_head(tuple(x.double() for x in inputs), targets, None)
    baseline = trained_head(inputs, targets, None)
    for name, value in actual.items():
        assert_close_to_reference(value, truth[name], baseline[name], dtype, name)
        wrong = value.clone()
        wrong.view(-1)[-1] += 8 * (wrong.abs().max() + 1) * torch.finfo(dtype).eps
        if dtype == FP32 and name in VALUES:
            with pytest.raises(AssertionError, match=name):
                assert_close_to_reference(wrong * 1.01, truth[name], baseline[name], dtype, name)


def test_where_the_fused_fold_is_not_taken(calls: list[int]) -> None:
    """Without the choice, with an accumulator, with a head to cast, on another backend."""
    hidden, weight = head_of(9, 16, 150, FP32)
    targets = torch.randint(0, 150, (9,))
    linear_logprob(hidden, weight, targets, backend="triton")
    with override({"head_fold": "fused"}):
        frozen = hidden.clone().requires_grad_()
        linear_logprob(frozen, weight, targets, backend="triton")
        linear_logprob(hidden, weight.to(BF16), targets, backend="triton")
        linear_logprob(hidden, weight, targets, backend="torch")
        linear_logprob(hidden, weight.T.contiguous().T, targets, backend="triton")
        assert calls == []
        found = linear_logprob(hidden, weight, targets, backend="triton").logprob
        loss = linear_cross_entropy(hidden, weight, targets, backend="triton", reduction="sum").loss
    assert calls == [150, 150]
    torch.testing.assert_close(found.sum(), -loss)
    tiles = linear_logprob(hidden, weight, targets, backend="triton").logprob
    torch.testing.assert_close(found, tiles, rtol=1e-5, atol=1e-5)
