"""linear_logprob and linear_cross_entropy against their peers and against their bare GEMMs.

    python -m bench.ops head --widths 576 1024 2048
    python -m pytest bench/ops/bench_linear_logprob.py --benchmark-group-by=group

Every contender computes forward and backward of a sum of cross-entropies, from the same tensors.
The bare GEMMs write into reused buffers: nothing else happens there, so they are the floor. A
frozen head needs two, logits and d hidden; a trained one d weight besides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.ops.contender import Case, Contender, Results, forward_backward
from fastpost_kernels import linear_cross_entropy, linear_logprob, reference

ROWS, WIDTH, VOCAB, TILE = 1024, 576, 49_152, 4096
OPS = {"frozen head": 2, "trained head": 3}  # and their GEMMs
_TRUTH_ROWS = 128

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    hidden: Tensor  # [ROWS, WIDTH]
    weight: Tensor  # [VOCAB, WIDTH]
    targets: Tensor  # [ROWS]


def problem(
    rows: int = ROWS, width: int = WIDTH, vocab: int = VOCAB, device: str | torch.device = "cpu"
) -> Problem:
    """Random bf16 tensors; by default of SmolLM2-135M's head. Logits are of size 5 at any width."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width).bfloat16()
    weight = torch.empty(vocab, width).normal_(std=0.05 * (WIDTH / width) ** 0.5).bfloat16()
    targets = torch.randint(0, vocab, (rows,))
    return Problem(*(tensor.to(device) for tensor in (hidden, weight, targets)))


def bare_gemms(data: Problem, count: int) -> Callable[[], Results]:
    """The first `count` of: logits tiles, d hidden, d weight; buffers allocated once."""
    tile = torch.randn(len(data.hidden), TILE, device=data.hidden.device).to(data.hidden.dtype)
    d_hidden, d_weight = torch.empty_like(data.hidden), torch.empty_like(data.weight)
    logits = torch.empty_like(tile)
    spans = range(0, len(data.weight), TILE)

    def run() -> Results:
        for first in spans:
            weight = data.weight[first : first + TILE]
            out = logits[:, : len(weight)]
            torch.mm(data.hidden, weight.T, out=out)
            if count > 1:
                torch.mm(tile[:, : len(weight)], weight, out=d_hidden)
            if count > 2:
                torch.mm(tile[:, : len(weight)].T, data.hidden, out=d_weight[first : first + TILE])
        return {}

    return run


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return -logits.float().log_softmax(-1).gather(-1, targets[:, None]).sum()


def _row_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 256) -> Tensor:
    """Chunks of rows under checkpointing, as torchtune's chunked losses run them."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        total = total + checkpoint(_plain, hidden[rows], weight, targets[rows], use_reentrant=False)
    return total


def _torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own; its chunked path, which the options ask for."""
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, reduction="sum", options=options
    )


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ())
    return -found[0].sum()


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")


def _ours(backend: str) -> Loss:
    return lambda h, w, t: -linear_logprob(h, w, t, backend=backend).logprob.sum()


def _ours_loss(backend: str) -> Loss:
    return lambda h, w, t: linear_cross_entropy(h, w, t, reduction="sum", backend=backend).loss


def _losses(backend: str, trained: bool) -> dict[str, Loss]:
    """Programs by name; `backend` is our fast one on this device."""
    found = {
        f"fastpost {backend}": _ours(backend),
        "fastpost torch": _ours("torch"),
        "TRL ChunkedLogProb": _trl,
        "torch linear_cross_entropy": _torch_linear_cross_entropy,
        "row chunks": _row_chunks,
        "logits + log_softmax": _plain,
        "Liger": _liger,
    }
    if trained:
        found = {
            f"fastpost cross-entropy {backend}": _ours_loss(backend),
            "fastpost cross-entropy torch": _ours_loss("torch"),
        } | found
    return found


def _truth(data: Problem, trained: bool) -> Results:
    """The specification in float64, by chunks of rows."""
    hidden = data.hidden.double().requires_grad_()
    weight = data.weight.double().requires_grad_(trained)
    total = hidden.new_zeros(())
    for start in range(0, len(hidden), _TRUTH_ROWS):
        part = slice(start, start + _TRUTH_ROWS)
        loss = reference.linear_cross_entropy(hidden[part], weight, data.targets[part])
        loss.backward()
        total += loss.detach()
    grads = {"d hidden": hidden.grad} | ({"d weight": weight.grad} if trained else {})
    return {"output": total} | {name: grad for name, grad in grads.items() if grad is not None}


def case(op: str, data: Problem) -> Case:
    """Everything that competes for one of OPS."""
    trained, gemms = op == "trained head", OPS[op]
    device = data.hidden.device.type
    inputs = {
        "hidden": data.hidden.detach().requires_grad_(),
        "weight": data.weight.detach().requires_grad_(trained),
        "targets": data.targets,
    }
    losses = _losses("cpp" if device == "cpu" else "triton", trained)
    rows = [Contender(f"{gemms} bare GEMMs", bare_gemms(data, gemms), is_floor=True)]
    rows += [
        Contender(name, forward_backward(loss, inputs), gpu_only=name == "Liger")
        for name, loss in losses.items()
    ]
    (count, width), vocab = data.hidden.shape, len(data.weight)
    return Case(
        op,
        f"M {count}, H {width}, V {vocab}",
        lambda: _truth(data, trained),
        forward_backward(_plain, inputs),
        tuple(rows),
    )


def cases(
    width: int = WIDTH, device: str | torch.device = "cpu", rows: int = ROWS, vocab: int = VOCAB
) -> list[Case]:
    """Both heads at one width."""
    data = problem(rows, width, vocab, device)
    return [case(op, data) for op in OPS]


_by_op = lru_cache(maxsize=1)(lambda width: {found.op: found for found in cases(width)})


@pytest.mark.parametrize("name", [*_losses("cpp", True), "floor"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [WIDTH, 1024, 2048])
def test_forward_backward(benchmark: Any, width: int, op: str, name: str) -> None:
    found = _by_op(width)[op]
    named = {"floor" if c.is_floor else c.name: c for c in found.contenders}
    if name not in named or named[name].gpu_only:
        pytest.skip(f"{name} does not compete here")
    benchmark.group = f"{op}: {found.shape}"
    benchmark.pedantic(named[name].run, rounds=5, warmup_rounds=1)
