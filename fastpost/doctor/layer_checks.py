"""Checks of the layers between attention and head: norm, activation, linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fastpost_kernels import linear, reference, rms_norm, swiglu

from .kernel_check import Check, Sizes

__all__ = ["layer_checks"]

EPS = 1e-5

Program = Callable[..., Tensor]


def layer_checks(dtype: torch.dtype, sizes: Sizes) -> Iterator[Check]:
    """Each with every gradient; they choose their backend by device, and have none in Triton."""
    rows, width = sizes.rows, sizes.width

    def normalise(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, EPS)

    def truly_normalise(x: Tensor, weight: Tensor) -> Tensor:
        return reference.rms_norm(x, weight, EPS)

    outputs = width + 1
    layers: dict[str, tuple[Program, Program, dict[str, tuple[int, ...]]]] = {
        "rms_norm": (normalise, truly_normalise, {"x": (rows, width), "weight": (width,)}),
        "swiglu": (swiglu, reference.swiglu, {"gate": (rows, width), "up": (rows, width)}),
        "linear": (
            linear,
            functional.linear,
            {"x": (rows, width), "weight": (outputs, width), "bias": (outputs,)},
        ),
    }
    for op, (kernel, specification, shapes) in layers.items():
        generator = torch.Generator().manual_seed(2)
        tensors = {
            name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in shapes.items()
        }
        yield Check(
            op,
            "every gradient",
            dtype,
            f"M={rows} H={width}",
            tensors,
            tuple(tensors),
            _named(kernel),
            _named(specification),
            ("out",),
        )


def _named(program: Program) -> Callable[..., dict[str, Tensor]]:
    return lambda **given: {"out": program(**given)}
