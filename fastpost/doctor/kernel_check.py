"""One check of a kernel: its results and gradients against the float64 reference, in bounds.

A result may be twice as wrong as the plain reference in the tested dtype, plus one rounding
(`fastpost_kernels.testing`). Reference and baseline run on the CPU, so that nothing of the device
is taken on trust. Inputs, results and scratch lie in guarded memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpost_kernels.testing import errors_and_limits

from .guarded_memory import GuardedMemory

__all__ = ["Check", "CheckResult", "Sizes", "carry_out"]


@dataclass(frozen=True)
class Sizes:
    """Shapes of the checks. Rows and vocabulary are no multiples of a tile on purpose."""

    rows: int
    width: int  # a multiple of 32
    vocab: int
    memory_budget: int  # bytes; small enough for several tiles
    head_sizes: tuple[int, ...]
    heads: tuple[int, int]  # of queries and of keys
    segments: tuple[tuple[int, int, int], ...]
    window: int


@dataclass(frozen=True)
class CheckResult:
    """One line of the report: the result that came closest to its tolerance, or went past it."""

    op: str
    form: str
    dtype: str
    shape: str
    worst: str  # which result the two numbers below are of
    error: float  # relative, see `fastpost_kernels.testing`
    tolerance: float
    fault: str | None  # why the check failed

    @property
    def ok(self) -> bool:
        return self.fault is None


@dataclass(frozen=True)
class Check:
    """`run(op, tensors)` returns named results, gradients among them, of either op."""

    op: str
    form: str
    dtype: torch.dtype
    shape: str
    tensors: dict[str, Tensor]
    trained: tuple[str, ...]  # tensors whose gradients are results too
    kernel: Callable[..., dict[str, Tensor]]
    specification: Callable[..., dict[str, Tensor]]
    differentiated: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()  # results that must be equal


def carry_out(check: Check, device: torch.device) -> CheckResult:
    truth = _results(check, check.specification, check.tensors, torch.float64)
    baseline = _results(check, check.specification, check.tensors, check.dtype)
    memory = GuardedMemory()
    try:
        given = {name: memory.guard(x.to(device)) for name, x in check.tensors.items()}
        with memory:
            actual = _results(check, check.kernel, given, check.dtype)
        actual = {name: x.cpu() for name, x in actual.items()}
        is_untouched = memory.is_untouched()
    except Exception as error:  # whatever a kernel raises is a finding, and the next check runs
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return _report(check, "", float("nan"), 0.0, f"{type(error).__name__}: {first_line}")
    return _judge(check, actual, truth, baseline, is_untouched)


def _results(
    check: Check,
    function: Callable[..., dict[str, Tensor]],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Results and gradients; the seed of each result is the same wherever it is computed."""
    leaves = {}
    for name, x in tensors.items():
        leaf = x.detach()
        if leaf.is_floating_point() and leaf.dtype != dtype:
            leaf = leaf.to(dtype)
        leaves[name] = leaf.requires_grad_(name in check.trained)
    found = function(**leaves)
    results = {name: x.detach() for name, x in found.items()}
    if not check.trained:
        return results
    outputs = tuple(found[name] for name in check.differentiated)
    seeds: list[Tensor] = []
    for index, output in enumerate(outputs):
        generator = torch.Generator().manual_seed(100 + index)
        seed = torch.randn(output.shape, generator=generator).to(check.dtype)
        seeds.append(seed.to(output.device, output.dtype))
    grads = torch.autograd.grad(outputs, [leaves[name] for name in check.trained], seeds)
    names = (f"d {name}" for name in check.trained)
    return results | dict(zip(names, grads, strict=True))


def _judge(
    check: Check,
    actual: dict[str, Tensor],
    truth: dict[str, Tensor],
    baseline: dict[str, Tensor],
    is_untouched: bool,
) -> CheckResult:
    worst, error, tolerance, fault = "", 0.0, 1.0, None
    for name, got in actual.items():
        if name in check.exact:
            if not torch.equal(got, truth[name]):
                differ = int((got != truth[name]).sum())
                return _report(check, name, float(differ), 0.0, f"{name} differs in {differ} rows")
            continue
        if not bool(torch.isfinite(got).all()):
            fault = f"{name} holds NaN or infinity: unwritten, or read outside a buffer"
            return _report(check, name, float("nan"), tolerance, fault)
        for got_error, limit in errors_and_limits(got, truth[name], baseline[name], check.dtype):
            if not worst or got_error * tolerance > error * limit:
                worst, error, tolerance = name, got_error, limit
    if error > tolerance:
        fault = f"{worst} is further from the reference than the tolerance"
    if not is_untouched:
        fault = "wrote outside a buffer"
    return _report(check, worst, error, tolerance, fault)


def _report(
    check: Check, worst: str, error: float, tolerance: float, fault: str | None
) -> CheckResult:
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[check.dtype]
    return CheckResult(check.op, check.form, dtype, check.shape, worst, error, tolerance, fault)
