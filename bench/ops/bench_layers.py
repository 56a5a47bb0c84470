"""rms_norm, swiglu and linear against PyTorch's and Liger's, forward and backward in bf16.

    python -m bench.ops layers --widths 576 1024 2048
    python -m pytest bench/ops/bench_layers.py --benchmark-group-by=group

The floor of the two chains of element-wise steps is their traffic alone: PyTorch's copies and sums
that read and write as many bytes, into reused buffers. That of `linear` is its three GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.ops.contender import Case, Contender, Results, forward_backward
from fastpost_kernels import linear, reference, rms_norm, swiglu

ROWS = 2048
EPS = 1e-5
OPS = ("rms_norm", "swiglu", "linear")
_DTYPE = torch.bfloat16


def intermediate(width: int) -> int:
    """A gated MLP's inner width, 8/3 of the outer as in Llama: 1536 at 576."""
    return -(-8 * width // (3 * 64)) * 64


def _eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm's lines."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def _liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def _liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


# By op: the plain program first, it is the baseline.
PROGRAMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "rms_norm": {
        "eager": _eager_rms_norm,
        "torch rms_norm": lambda x, weight: functional.rms_norm(x, x.shape[-1:], weight, EPS),
        "fastpost": lambda x, weight: rms_norm(x, weight, EPS),
        "Liger": _liger_rms_norm,
    },
    "swiglu": {
        "eager": _eager_swiglu,
        "fastpost": lambda gate, up: swiglu(gate, up),
        "Liger": _liger_swiglu,
    },
    "linear": {
        "torch linear": functional.linear,
        "fastpost": lambda x, weight: linear(x, weight),
    },
}
SPECIFICATION: dict[str, Callable[..., Tensor]] = {
    "rms_norm": lambda x, weight: reference.rms_norm(x, weight, EPS),
    "swiglu": reference.swiglu,
    "linear": functional.linear,
}


def _traffic(rows: int, width: int, copies: int, sums: int, device: Any) -> Callable[[], Results]:
    """`copies` of two accesses and `sums` of three to [rows, width]."""
    a, b, out = (torch.randn(rows, width, device=device).to(_DTYPE) for _ in range(3))

    def run() -> Results:
        for _ in range(copies):
            out.copy_(a)
        for _ in range(sums):
            torch.add(a, b, out=out)
        return {}

    return run


def _linear_gemms(x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], Results]:
    y, d_x, d_weight = (torch.empty_like(t) for t in (grad, x, weight))

    def run() -> Results:
        torch.mm(x, weight.T, out=y)
        torch.mm(grad, weight, out=d_x)
        torch.mm(grad.T, x, out=d_weight)
        return {}

    return run


def _shapes(op: str, rows: int, width: int) -> dict[str, tuple[int, int]]:
    """Of the inputs, and of the output's gradient last. A norm's weight is one row."""
    inner = intermediate(width)
    if op == "rms_norm":
        return {"x": (rows, width), "weight": (1, width), "grad": (rows, width)}
    if op == "swiglu":
        return {name: (rows, inner) for name in ("gate", "up", "grad")}
    return {"x": (rows, width), "weight": (inner, width), "grad": (rows, inner)}


def case(op: str, width: int, device: str | torch.device = "cpu", rows: int = ROWS) -> Case:
    """Everything that competes for one of OPS."""
    torch.manual_seed(0)
    shapes = _shapes(op, rows, width)
    tensors = {name: torch.randn(shape).to(_DTYPE).to(device) for name, shape in shapes.items()}
    if op == "rms_norm":
        tensors["weight"] = tensors["weight"][0]
    grad = tensors.pop("grad")
    inputs = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    if op == "linear":
        x, weight = (tensor.detach() for tensor in inputs.values())
        floor = Contender("3 bare GEMMs", _linear_gemms(x, weight, grad), is_floor=True)
    else:
        # rms_norm reads x, writes y; reads x and dy, writes dx. swiglu reads gate and up, writes y;
        # reads both and dy, writes their gradients.
        copies, sums = (1, 1) if op == "rms_norm" else (1, 2)
        traffic = _traffic(rows, shapes["grad"][1], copies, sums, device)
        floor = Contender("its bytes alone", traffic, is_floor=True)
    runs = {name: forward_backward(f, inputs, grad) for name, f in PROGRAMS[op].items()}
    rivals = [Contender(name, run, gpu_only=name == "Liger") for name, run in runs.items()]
    return Case(
        op,
        " to ".join(str(size) for size in _label(op, rows, width)),
        forward_backward(SPECIFICATION[op], exact, grad.double()),
        next(iter(runs.values())),
        (floor, *rivals),
    )


def _label(op: str, rows: int, width: int) -> list[str]:
    inner = intermediate(width)
    if op == "linear":
        return [f"{rows} rows, {width}", str(inner)]
    return [f"{rows} rows of {width if op == 'rms_norm' else inner}"]


def cases(width: int = 576, device: str | torch.device = "cpu", rows: int = ROWS) -> list[Case]:
    """All layers at one width of the model."""
    return [case(op, width, device, rows) for op in OPS]


_case = lru_cache(maxsize=1)(case)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS for name in ("floor", *PROGRAMS[op])]
)
@pytest.mark.parametrize("width", [576, 1024, 2048])
def test_forward_backward(benchmark: Any, width: int, op: str, name: str) -> None:
    found = _case(op, width)
    named = {"floor" if c.is_floor else c.name: c for c in found.contenders}
    if named[name].gpu_only:
        pytest.skip("GPU only")
    benchmark.group = f"{op}: {found.shape}"
    benchmark.pedantic(named[name].run, rounds=20, warmup_rounds=3)
