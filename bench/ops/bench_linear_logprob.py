"""linear_logprob and linear_cross_entropy against their peers and against their bare GEMMs.

Every contender computes forward and backward of a sum of log-probs, from the same bf16 tensors. The
bare GEMMs write into reused buffers: nothing else happens there, so they are the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fastpost_kernels import linear_cross_entropy, linear_logprob
from fastpost_kernels._kept_buffer import release_kept_buffers

ROWS, WIDTH, VOCAB, TILE = 1024, 576, 49_152, 4096


class Problem(NamedTuple):
    hidden: Tensor  # [ROWS, WIDTH]
    weight: Tensor  # [VOCAB, WIDTH]
    targets: Tensor  # [ROWS]


class Contender(NamedTuple):
    op: str
    name: str
    run: Callable[[], Any]
    gemms: int  # of its op's floor


def problem(rows: int = ROWS, width: int = WIDTH, vocab: int = VOCAB) -> Problem:
    """Random bf16 tensors of SmolLM2-135M's head."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width).bfloat16()
    weight = (0.05 * torch.randn(vocab, width)).bfloat16()
    return Problem(hidden, weight, torch.randint(0, vocab, (rows,)))


def bare_gemms(data: Problem, count: int) -> Callable[[], None]:
    """The first `count` of: logits tiles, d hidden, d weight; buffers allocated once."""
    tile = torch.randn(len(data.hidden), TILE).bfloat16()
    d_hidden, d_weight = torch.empty_like(data.hidden), torch.empty_like(data.weight)
    logits = torch.empty_like(tile)
    spans = range(0, len(data.weight), TILE)

    def run() -> None:
        for first in spans:
            weight = data.weight[first : first + TILE]
            out = logits[:, : len(weight)]
            torch.mm(data.hidden, weight.T, out=out)
            if count > 1:
                torch.mm(tile[:, : len(weight)], weight, out=d_hidden)
            if count > 2:
                torch.mm(tile[:, : len(weight)].T, data.hidden, out=d_weight[first : first + TILE])

    return run


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return logits.float().log_softmax(-1).gather(-1, targets[:, None]).sum()


def _row_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 256) -> Tensor:
    """Chunks of rows under checkpointing, as torchtune's chunked losses run them."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        total = total + checkpoint(_plain, hidden[rows], weight, targets[rows], use_reentrant=False)
    return total


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ())
    return found[0].sum()


def _ours(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda h, w, t: linear_logprob(h, w, t, backend=backend).logprob.sum()


def _ours_loss(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, backend=backend).loss

    return loss


def _forward_backward(
    data: Problem, loss: Callable[[Tensor, Tensor, Tensor], Tensor], trained: bool
) -> Callable[[], None]:
    def run() -> None:
        hidden = data.hidden.detach().requires_grad_()
        weight = data.weight.detach().requires_grad_(trained)
        loss(hidden, weight, data.targets).backward()

    return run


def contenders(data: Problem) -> list[Contender]:
    """Every row of the table; the bare GEMMs come first in their op."""
    found = []
    for op, trained, gemms in (("frozen head", False, 2), ("trained head", True, 3)):
        found.append(Contender(op, f"{gemms} bare GEMMs", bare_gemms(data, gemms), gemms))
        losses = {
            "fastpost cpp": _ours("cpp"),
            "fastpost torch": _ours("torch"),
            "TRL ChunkedLogProb": _trl,
            "row chunks": _row_chunks,
            "logits + log_softmax": _plain,
        }
        if trained:
            losses = {
                "fastpost cross-entropy cpp": _ours_loss("cpp"),
                "fastpost cross-entropy torch": _ours_loss("torch"),
            } | losses
        for name, loss in losses.items():
            found.append(Contender(op, name, _forward_backward(data, loss, trained), gemms))
    return found


def peak_bytes(run: Callable[[], Any]) -> int:
    """Largest amount of CPU memory that torch's allocator held during `run`, above its start.

    A buffer kept from an earlier call would not show up as an allocation: it is released first.
    """
    release_kept_buffers()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("contender", contenders(problem()), ids=lambda c: f"{c.op}-{c.name}")
def test_forward_backward(benchmark: Any, contender: Contender) -> None:
    """`pytest bench/ops/bench_linear_logprob.py`: the same rows under pytest-benchmark."""
    benchmark.group = contender.op
    benchmark.pedantic(contender.run, rounds=5, warmup_rounds=1)
