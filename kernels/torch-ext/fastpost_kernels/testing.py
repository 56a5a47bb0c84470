"""How far a kernel may be from the truth, and guards around its buffers.

The truth is the reference in float64. A kernel passes if it is at most twice as wrong as the plain
reference in the tested dtype, plus one rounding of the result: measured by the largest element and
by root mean square, both relative to the same norm of the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EPSILON", "Canary", "assert_close_to_reference", "relative_errors"]

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


def assert_close_to_reference(
    actual: Tensor, truth: Tensor, baseline: Tensor, dtype: torch.dtype, name: str = "result"
) -> None:
    """`actual` against `truth` (float64), allowed 2 * error of `baseline` + EPSILON[dtype]."""
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    for kind, got, allowed in zip(
        ("max", "rms"),
        relative_errors(actual, truth),
        relative_errors(baseline, truth),
        strict=True,
    ):
        limit = 2 * allowed + EPSILON[dtype]
        assert got <= limit, (
            f"{name}: {kind} error {got:.3g} > {limit:.3g} (baseline {allowed:.3g})"
        )


class Canary:
    """A matrix inside a larger buffer whose margins must survive."""

    VALUE = -12345.0

    def __init__(self, matrix: Tensor, margin: int = 16) -> None:
        rows, cols = matrix.shape
        self.buffer = matrix.new_full((rows + 2 * margin, cols + 2 * margin), self.VALUE)
        self.inner = self.buffer[margin : margin + rows, margin : margin + cols]
        self.inner.copy_(matrix)

    def assert_untouched(self) -> None:
        """Every element outside `inner` still holds VALUE (as its dtype rounds it)."""
        outside = self.buffer.clone()
        value = outside.new_full((), self.VALUE)
        rows, cols = self.inner.shape
        margin = (self.buffer.shape[0] - rows) // 2
        outside[margin : margin + rows, margin : margin + cols] = value
        assert torch.equal(outside, value.expand_as(outside)), "wrote outside its buffer"
