"""preference_logratio against its peers and against its bare GEMMs.

    python -m bench.ops preference --widths 576 2048
    python -m pytest bench/ops/bench_preference_logratio.py --benchmark-group-by=group

Every contender computes the DPO loss of four pairs and its gradients from the same rows of policy
and reference, which have one head, as with the adapter off. The floor is three GEMMs with a frozen
head (logits of both, d hidden), four with a trained one (d weight besides). "two calls" is what
`linear_logprob` gives by itself: policy and reference apart, sums by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ops import bench_linear_logprob as head
from bench.ops.contender import Case, Contender, Results, forward_backward
from fastpost_kernels import HeadRows, linear_logprob, preference_logratio, reference

BETA, SEQUENCES = 0.1, 8
OPS = {"frozen head": 2, "trained head": 3}  # and the policy's GEMMs


class Problem(NamedTuple):
    policy: head.Problem
    reference: head.Problem
    cu_seqlens: Tensor  # [SEQUENCES + 1]


Loss = Callable[[Tensor, Tensor], Tensor]


def problem(rows: int, width: int, vocab: int, device: str | torch.device) -> Problem:
    """The reference's rows lie near the policy's: after some steps, not at the first."""
    policy = head.problem(rows - rows % SEQUENCES, width, vocab, device)
    hidden = policy.hidden + 0.1 * torch.randn_like(policy.hidden)
    count = len(policy.hidden)
    cu_seqlens = torch.arange(0, count + 1, count // SEQUENCES, device=policy.hidden.device)
    return Problem(policy, policy._replace(hidden=hidden), cu_seqlens)


def _loss_of_margins(margins: Tensor) -> Tensor:
    return -F.logsigmoid(BETA * margins).mean()


def _by_rows(data: Problem, logprob: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """DPO from any function of (hidden, weight, targets) to log-probs, called twice."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            ref = logprob(data.reference.hidden, weight, data.reference.targets)
        ratios = (logprob(hidden, weight, data.policy.targets) - ref).view(SEQUENCES, -1).sum(1)
        chosen, rejected = ratios.chunk(2)
        return _loss_of_margins(chosen - rejected)

    return loss


def _ours(data: Problem, backend: str) -> Loss:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        policy = HeadRows(hidden, weight, data.policy.targets)
        ref = HeadRows(data.reference.hidden, weight, data.reference.targets)
        return _loss_of_margins(
            preference_logratio(policy, ref, data.cu_seqlens, backend=backend).margins
        )

    return loss


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ())[0]


def _liger(data: Problem) -> Loss:
    """Its gradients come from the forward, those of the weight always among them."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        def rows(flat: Tensor) -> Tensor:
            return flat.view(SEQUENCES, -1, *flat.shape[1:])

        # not through __call__: the FLOP counter's hooks cannot take a leaf that is differentiated
        found = LigerFusedLinearDPOLoss(beta=BETA, compiled=False).forward(
            weight,
            rows(hidden),
            rows(data.policy.targets),
            None,
            rows(data.reference.hidden),
            weight,
        )
        return found[0]

    return loss


def _losses(data: Problem, backend: str) -> dict[str, Loss]:
    """Programs by name; `backend` is our fast one on this device."""

    def two_calls(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, targets, backend=backend).logprob

    return {
        f"fastpost {backend}": _ours(data, backend),
        "fastpost torch": _ours(data, "torch"),
        f"fastpost {backend}, two calls": _by_rows(data, two_calls),
        "TRL ChunkedLogProb": _by_rows(data, _trl),
        "logits + log_softmax": _by_rows(data, _plain),
        "Liger fused linear DPO": _liger(data),
    }


def _floor(data: Problem, gemms: int) -> Callable[[], Results]:
    both = head.bare_gemms(data.policy, gemms), head.bare_gemms(data.reference, 1)

    def run() -> Results:
        for gemm in both:
            gemm()
        return {}

    return run


def _truth(data: Problem, trained: bool) -> Results:
    """The specification in float64. Few rows at a time would need two passes: rows are few."""
    policy, ref = data.policy, data.reference
    hidden = policy.hidden.double().requires_grad_()
    weight = policy.weight.double().requires_grad_(trained)
    with torch.no_grad():
        ref_logprob = reference.linear_logprob(ref.hidden.double(), weight, ref.targets)["logprob"]
    found = reference.preference_logratio(
        hidden, weight, policy.targets, data.cu_seqlens, ref_logprob
    )
    loss = _loss_of_margins(found["margins"])
    loss.backward()
    grads = {"d hidden": hidden.grad} | ({"d weight": weight.grad} if trained else {})
    return {"output": loss.detach()} | {n: grad for n, grad in grads.items() if grad is not None}


def case(op: str, data: Problem) -> Case:
    """Everything that competes for one of OPS."""
    trained, gemms = op == "trained head", OPS[op]
    device = data.policy.hidden.device.type
    inputs = {
        "hidden": data.policy.hidden.detach().requires_grad_(),
        "weight": data.policy.weight.detach().requires_grad_(trained),
    }
    rows = [Contender(f"{gemms + 1} bare GEMMs", _floor(data, gemms), is_floor=True)]
    rows += [
        Contender(name, forward_backward(loss, inputs))
        for name, loss in _losses(data, "cpp" if device == "cpu" else "triton").items()
    ]
    (count, width), vocab = data.policy.hidden.shape, len(data.policy.weight)
    return Case(
        f"DPO, {op}",
        f"2 x {count} rows, H {width}, V {vocab}",
        lambda: _truth(data, trained),
        forward_backward(_by_rows(data, _plain), inputs),
        tuple(rows),
    )


def cases(
    width: int = head.WIDTH,
    device: str | torch.device = "cpu",
    rows: int = head.ROWS // 2,
    vocab: int = head.VOCAB,
) -> list[Case]:
    """Both heads at one width."""
    data = problem(rows, width, vocab, device)
    return [case(op, data) for op in OPS]


_found = lru_cache(maxsize=1)(lambda width: dict(zip(OPS, cases(width), strict=True)))


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [head.WIDTH, 2048])
def test_forward_backward(benchmark: Any, width: int, op: str, place: int) -> None:
    found = _found(width)[op]
    benchmark.group = f"{found.op}: {found.shape}"
    benchmark.name = found.contenders[place].name
    benchmark.pedantic(found.contenders[place].run, rounds=5, warmup_rounds=1)
