"""Checks of 4-bit linear layers with an adapter: few rows (a GEMM that unpacks), many (tiles)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastpost_kernels import Nf4Weight, nf4_dequantize, nf4_linear, nf4_quantize, reference

from .kernel_check import Check, Sizes

__all__ = ["nf4_checks"]

RANK, SCALE, BLOCK = 8, 0.5, 32
FEW = 5


def nf4_checks(dtype: torch.dtype, sizes: Sizes, backend: str) -> Iterator[Check]:
    """Each with every gradient; the weight is frozen."""
    width, outputs = sizes.width, sizes.width + 8
    generator = torch.Generator().manual_seed(4)
    weight = nf4_quantize(torch.randn(outputs, width, generator=generator), block_size=BLOCK)
    # what is multiplied is the unpacked weight as the tested dtype holds it
    unpacked = nf4_dequantize(weight, dtype, backend="torch")

    def linear(**given: Any) -> dict[str, Tensor]:
        here = _on(weight, given["x"].device)
        return {"out": nf4_linear(**given, weight=here, scale=SCALE, backend=backend)}

    def true_linear(x: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"out": reference.lora_linear(x, unpacked.to(x.dtype), None, a, b, SCALE)}

    for form, rows in (("few rows", FEW), ("many rows", max(80, sizes.rows))):
        shapes = {"x": (rows, width), "a": (RANK, width), "b": (outputs, RANK)}
        tensors = {
            name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in shapes.items()
        }
        yield Check(
            "nf4_linear",
            form + ", triton" * (backend == "triton"),
            dtype,
            f"M={rows} K={width} N={outputs} r={RANK}",
            tensors,
            tuple(tensors),
            linear,
            true_linear,
            ("out",),
        )


def _on(weight: Nf4Weight, device: torch.device) -> Nf4Weight:
    """The weight with every tensor on `device`."""
    parts = (value.to(device) if isinstance(value, Tensor) else value for value in weight)
    return Nf4Weight(*parts)  # type: ignore[arg-type]
