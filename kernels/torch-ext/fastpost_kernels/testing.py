"""How far a kernel may be from the truth, and guards around its buffers.

The truth is the reference in float64. A kernel passes if it is at most twice as wrong as the plain
reference in the tested dtype, plus one rounding of the result: measured by the largest element and
by root mean square, both relative to the same norm of the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "EPSILON",
    "Canary",
    "assert_close_to_reference",
    "errors_and_limits",
    "guarded_call",
    "relative_errors",
]

# What rounding alone may cost, relative to the largest element of the result: about 8 units of fp32
# for another order of summation, one unit of bf16 for a result stored once. In float64 the baseline
# is the truth itself, so the whole allowance is here.
EPSILON = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def relative_errors(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """(largest, root mean square) error of `actual` relative to that norm of `truth`."""
    actual, truth = actual.detach().double(), truth.detach().double()
    error = actual - truth
    if error.numel() == 0:
        return 0.0, 0.0
    tiny = torch.finfo(torch.float64).tiny
    largest = error.abs().max() / truth.abs().max().clamp(min=tiny)
    rms = error.square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=tiny)
    return float(largest), float(rms)


def errors_and_limits(
    actual: Tensor, truth: Tensor, baseline: Tensor, dtype: torch.dtype
) -> list[tuple[float, float]]:
    """`relative_errors` of `actual`, each with what it may be: 2 * that of `baseline` + EPSILON."""
    found, allowed = relative_errors(actual, truth), relative_errors(baseline, truth)
    return [(x, 2 * y + EPSILON[dtype]) for x, y in zip(found, allowed, strict=True)]


def assert_close_to_reference(
    actual: Tensor, truth: Tensor, baseline: Tensor, dtype: torch.dtype, name: str = "result"
) -> None:
    """`actual` against `truth` (float64), allowed 2 * error of `baseline` + EPSILON[dtype]."""
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    pairs = errors_and_limits(actual, truth, baseline, dtype)
    for kind, (got, limit) in zip(("max", "rms"), pairs, strict=True):
        assert got <= limit, f"{name}: {kind} error {got:.3g} > {limit:.3g}"


class Canary:
    """A copy of a tensor inside a larger buffer in which nothing else may change.

    `inner` holds the values; before, after and between its elements lie guards. They are large and
    finite, so that reading one shows in the result and scaling one in place shows in the guard.
    """

    PATTERN = 0x45  # every byte: 3156.3 in float32, 3152 in bfloat16, 4.99e18 in int64
    inner: Tensor  # of the shape and dtype given

    def __init__(
        self, tensor: Tensor, margin: int = 16, strides: Sequence[int] | None = None
    ) -> None:
        """`margin` elements before and after. `strides` of `inner`, in elements; rows lie
        2 * margin apart if not given. Dimensions of stride 0 are expanded again."""
        shape = tensor.shape
        if strides is None:
            padded = [*shape[1:-1], *(size + 2 * margin for size in shape[1:][-1:]), 1]
            strides = [math.prod(padded[i:]) for i in range(len(shape))]
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        size = 2 * margin + (span if tensor.numel() else 0)
        self.buffer = tensor.new_zeros(size)
        self.is_guard = torch.ones(size, dtype=torch.bool, device=tensor.device)
        _bytes_of(self.buffer).fill_(self.PATTERN)
        self.inner = self.buffer.as_strided(shape, tuple(strides), margin)
        if tensor.numel():
            self.is_guard.as_strided(shape, tuple(strides), margin).fill_(False)
            source = tensor
            once = self.inner
            for dim, stride in enumerate(strides):
                if stride == 0:
                    source, once = source.narrow(dim, 0, 1), once.narrow(dim, 0, 1)
            once.copy_(source)

    def assert_untouched(self) -> None:
        """Every byte outside `inner` still holds PATTERN."""
        guards = _bytes_of(self.buffer).view(-1, self.buffer.itemsize)[self.is_guard]
        assert (guards == self.PATTERN).all(), (
            f"wrote outside a buffer of shape {list(self.inner.shape)}, {self.inner.dtype}"
        )


def guarded_call(function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """`function` with every tensor in a Canary of the same strides; what it wrote is copied back.

    `function` is a launch, as `kernel[grid]`. One tensor given twice stays one tensor.

    Raises AssertionError if a guard changed.
    """
    guarded: dict[tuple[Any, ...], tuple[Tensor, Canary]] = {}

    def guard(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if place not in guarded:
            guarded[place] = (value, Canary(value, strides=value.stride()))
        return guarded[place][1].inner

    function(*map(guard, args), **{name: guard(value) for name, value in kwargs.items()})
    for original, canary in guarded.values():
        canary.assert_untouched()
        if 0 not in original.stride():  # an expanded tensor is an input
            original.copy_(canary.inner)


def _bytes_of(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)
