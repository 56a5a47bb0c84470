"""One process of a vocabulary-parallel group: `python -m tests.ops.vocab_parallel_child FOLDER`.

Started by `test_vocab_parallel_logprob` with the variables torchrun would set. Runs every case, in
a group of two or of all three processes, and leaves what this rank got in FOLDER.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost_kernels import vocab_parallel_logprob

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "logsumexp")
TRANSFORMED = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}
EVERYTHING = ("logprob", "entropy", "logsumexp")


class Case(NamedTuple):
    """Shapes and options; rank r holds rows [cuts[r], cuts[r + 1]) of the vocabulary cuts[-1]."""

    cuts: tuple[int, ...]
    dtype: torch.dtype
    rows: int = 21
    width: int = 24
    backend: str = "auto"
    trained: bool = False
    masked: str = "some"
    has_bias: bool = True
    differentiated: tuple[str, ...] = ("logprob",)
    outputs: tuple[str, ...] = OUTPUTS
    budget: int | None = 9000  # several chunks of rows, several tiles
    options: Mapping[str, float] = MappingProxyType({})
    kind: str = "random"

    @property
    def size(self) -> int:
        return len(self.cuts) - 1

    @property
    def vocab(self) -> int:
        return self.cuts[-1]


# Biases of the ranks' rows. References of rows with a low target must move: with "peaked" by 80
# against each other, with "twins" to two maxima that lie close together and both count.
HEIGHTS = {"peaked": (-40.0, 10.0, 40.0), "twins": (-40.0, 30.0, 30.0)}
UNEVEN = (0, 700, 1009)
THREE = (0, 337, 674, 1009)


def _cases() -> dict[str, Case]:
    cases = {}
    for backend, dtype in (
        ("torch", FP64),
        *((name, dtype) for name in ("torch", "cpp", "triton") for dtype in (FP32, BF16)),
    ):
        for trained in (False, True):
            name = f"{backend}-{str(dtype)[6:]}-{'trained' if trained else 'frozen'}"
            plain = Case(UNEVEN, dtype, backend=backend, trained=trained)
            two = plain._replace(options=TRANSFORMED)
            three = plain._replace(cuts=THREE, differentiated=EVERYTHING)
            cases |= {f"{name}-two": two, f"{name}-three": three}
            if backend == "triton":  # its interpreter is slow: one way each
                del cases[f"{name}-two" if trained == (dtype == FP32) else f"{name}-three"]
    for trained in (False, True):
        name = "trained" if trained else "frozen"
        fp32 = Case(THREE, FP32, trained=trained)
        cases |= {
            f"{name}-no-bias": fp32._replace(has_bias=False),
            f"{name}-logprob-alone": fp32._replace(outputs=()),
            f"{name}-empty-part": fp32._replace(cuts=(0, 5, 10, 10), differentiated=EVERYTHING),
            f"{name}-one-row": fp32._replace(cuts=(0, 1, 2, 40)),
            f"{name}-all-masked": fp32._replace(masked="all"),
            f"{name}-no-rows": fp32._replace(rows=0),
            f"{name}-none-masked": fp32._replace(masked="none", budget=None),
            f"{name}-peaked": fp32._replace(kind="peaked", differentiated=EVERYTHING),
            f"{name}-twins": fp32._replace(kind="twins", differentiated=EVERYTHING),
            f"{name}-peaked-bf16": fp32._replace(kind="peaked", dtype=BF16),
            f"{name}-mixed-dtypes": fp32._replace(kind="mixed"),
        }
    return cases


CASES = _cases()


def problem(case: Case) -> dict[str, Any]:
    """The whole head, rows, targets and the loss's coefficients: the same on every rank."""
    random = torch.Generator().manual_seed(case.vocab + case.rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    targets = torch.randint(0, case.vocab, (case.rows,), generator=random)
    hidden, weight = normal(case.rows, case.width) / 2, normal(case.vocab, case.width)
    bias = None
    if case.has_bias:
        bias = normal(case.vocab)
    if case.kind in HEIGHTS:
        bias = torch.zeros(case.vocab)
        for rank, height in enumerate(HEIGHTS[case.kind]):
            bias[case.cuts[rank] : case.cuts[rank + 1]] = height
    if case.masked == "some":
        targets[::3] = -100
    if case.masked == "all":
        targets[:] = -100
    dtype = BF16 if case.kind == "mixed" else case.dtype
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(case.dtype),
        "bias": None if bias is None else bias.to(case.dtype),
        "targets": targets,
        "seeds": {name: normal(case.rows) for name in case.differentiated},
    }


def run(case: Case, group: dist.ProcessGroup) -> dict[str, Any]:
    """Values and gradients of this rank."""
    data = problem(case)
    start, end = case.cuts[group.rank()], case.cuts[group.rank() + 1]
    hidden = data["hidden"].requires_grad_()
    weight = data["weight"][start:end].clone().requires_grad_(case.trained)
    bias = data["bias"]
    if bias is not None:
        bias = bias[start:end].clone().requires_grad_(case.trained)
    got = vocab_parallel_logprob(
        hidden,
        weight,
        data["targets"],
        group,
        vocab_start=start,
        vocab_size=case.vocab,
        bias_shard=bias,
        outputs=case.outputs,
        backend=case.backend,
        memory_budget=case.budget,
        compute_dtype=FP32 if case.kind == "mixed" else None,
        **case.options,
    )._asdict()
    loss = sum((got[name] * seed).sum() for name, seed in data["seeds"].items())
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    wanted = {k: v for k, v in leaves.items() if v is not None and v.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    values = {k: None if v is None else v.detach() for k, v in got.items()}
    return {"values": values, "grads": dict(zip(wanted, grads, strict=True))}


def ties(group: dist.ProcessGroup) -> list[bool]:
    """Equal rows of the head on different ranks: only the first of the vocabulary is top-1."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(1009, 16, generator=random)
    hidden = torch.randn(1, 16, generator=random)
    copies = torch.tensor([5, 600, 1008])
    weight[copies] = 2 * weight[(hidden @ weight.T).argmax()]
    start, end = THREE[group.rank()], THREE[group.rank() + 1]
    found = vocab_parallel_logprob(
        hidden.expand(3, -1),
        weight[start:end],
        copies,
        group,
        vocab_start=start,
        vocab_size=1009,
        outputs=("is_top1",),
    )
    assert found.is_top1 is not None
    return found.is_top1.tolist()


def nan_rows(group: dist.ProcessGroup) -> list[list[bool]]:
    """Which rows of the results are NaN, when row 1 of hidden is."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, generator=random), torch.randn(1009, 8, generator=random)
    hidden[1, 3] = float("nan")
    hidden.requires_grad_()
    start, end = THREE[group.rank()], THREE[group.rank() + 1]
    got = vocab_parallel_logprob(
        hidden,
        weight[start:end],
        torch.tensor([3, 400, 700, 1000]),
        group,
        vocab_start=start,
        vocab_size=1009,
        outputs=("entropy",),
    )
    got.logprob.sum().backward()
    assert got.entropy is not None and hidden.grad is not None
    return [x.isnan().tolist() for x in (got.logprob, got.entropy, hidden.grad.sum(1))]


# What one rank of three does wrong: the rank, and the arguments it changes.
FAULTS: dict[str, tuple[int, dict[str, Any]]] = {
    "bad-target-on-one": (1, {"targets": torch.tensor([0, 9, 2])}),
    "shape": (2, {"targets": torch.tensor([0, 1])}),
    "dtype": (1, {"hidden": torch.zeros(3, 4, dtype=torch.float16)}),
    "transform": (0, {"temperature": -1.0}),
    "backend": (1, {"backend": "cpp", "compute_dtype": FP64}),
    "other-targets": (2, {"targets": torch.tensor([0, 2, 1])}),
    "other-temperature": (1, {"temperature": 2.0, "softcap": 3.0}),
    "other-budget": (1, {"memory_budget": 77}),
    "other-outputs": (2, {"outputs": ("entropy",)}),
    "other-rows": (1, {"hidden": torch.zeros(2, 4), "targets": torch.tensor([0, 1])}),
    "no-gradient": (1, {"hidden": torch.zeros(3, 4, requires_grad=True)}),
    "overlap": (1, {"vocab_start": 1}),
    "gap": (2, {"weight_shard": torch.zeros(1, 4)}),
    "padded": (2, {"weight_shard": torch.zeros(4, 4)}),
}
EVERYWHERE = {"targets": torch.tensor([0, -7, 6])}


def fault(name: str, group: dist.ProcessGroup) -> str:
    """The error this rank saw, and the result of the next call, which must be in step."""
    rank, change = (group.rank(), EVERYWHERE) if name == "everywhere" else FAULTS[name]
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight_shard": torch.zeros(2, 4),
        "targets": torch.tensor([0, 1, 2]),
        "group": group,
        "vocab_start": 2 * group.rank(),
        "vocab_size": 6,
    }
    seen = "nothing"
    try:
        vocab_parallel_logprob(**arguments | (change if group.rank() == rank else {}))
    except (ValueError, TypeError) as error:
        seen = f"{type(error).__name__}: {error}"
    after = vocab_parallel_logprob(**arguments).logprob
    torch.testing.assert_close(after, torch.full((3,), 1 / 6).log())
    return seen


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    everyone, pair = dist.group.WORLD, dist.new_group([0, 1])
    assert everyone is not None
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        if case.size == 3:
            found[name] = run(case, everyone)
        elif dist.get_rank() < 2:
            found[name] = run(case, pair)
    more: dict[str, Callable[[dist.ProcessGroup], Any]] = {"ties": ties, "nan": nan_rows}
    found |= {name: function(everyone) for name, function in more.items()}
    found["faults"] = {name: fault(name, everyone) for name in (*FAULTS, "everywhere")}
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
