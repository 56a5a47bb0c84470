"""Checks of adapted linear layers: LoRA with and without dropout, DoRA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpost_kernels import dora_linear, lora_linear, reference

from .kernel_check import Check, Sizes

__all__ = ["adapter_checks"]

RANK, SCALE = 8, 0.5
DROPOUT: dict[str, Any] = {"dropout_p": 0.25, "seed": 7}


def adapter_checks(dtype: torch.dtype, sizes: Sizes, backend: str) -> Iterator[Check]:
    """Each with every gradient."""
    rows, width = sizes.rows, sizes.width
    outputs = width + 8
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "x": (rows, width),
        "weight": (outputs, width),
        "bias": (outputs,),
        "a": (RANK, width),
        "b": (outputs, RANK),
    }
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    magnitude = {"magnitude": torch.rand(outputs, generator=generator).to(dtype) + 1}
    weight, a, b = (tensors[name].float() for name in ("weight", "a", "b"))
    norm = reference.dora_weight_norm(weight, a, b, SCALE)
    kept = _kept(rows, width)

    def lora(options: dict[str, Any], **given: Any) -> dict[str, Tensor]:
        return {"out": lora_linear(**given, scale=SCALE, **options, backend=backend)}

    def true_lora(options: dict[str, Any], **given: Any) -> dict[str, Tensor]:
        mask = kept.to(given["x"]) if options else None
        return {"out": reference.lora_linear(**given, scale=SCALE, kept=mask)}

    def dora(options: dict[str, Any], **given: Any) -> dict[str, Tensor]:
        fixed = norm.to(given["x"].device)
        return {"out": dora_linear(**given, scale=SCALE, weight_norm=fixed, backend=backend)}

    def true_dora(options: dict[str, Any], **given: Any) -> dict[str, Tensor]:
        fixed = norm.to(given["x"])
        return {"out": reference.dora_linear(**given, scale=SCALE, weight_norm=fixed)}

    for op, form, inputs, options, kernel, specification in (
        ("lora_linear", "no dropout", tensors, {}, lora, true_lora),
        ("lora_linear", "dropout", tensors, DROPOUT, lora, true_lora),
        ("dora_linear", "no dropout", tensors | magnitude, {}, dora, true_dora),
    ):
        yield Check(
            op,
            form + ", triton" * (backend == "triton"),
            dtype,
            f"M={rows} K={width} N={outputs} r={RANK}",
            inputs,
            tuple(inputs),
            partial(kernel, options),
            partial(specification, options),
            ("out",),
        )


def _kept(rows: int, width: int) -> Tensor:
    """The mask that the seed stands for, times 1 / (1 - p): what an adapter makes of ones."""
    identity, ones = torch.eye(width), torch.ones(rows, width)
    weight = torch.zeros(width, width)
    return lora_linear(ones, weight, None, identity, identity, 1.0, **DROPOUT, backend="torch")
