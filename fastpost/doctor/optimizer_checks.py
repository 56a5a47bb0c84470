"""Checks of the optimizer's kernel: a step of weights, and every level of the 8-bit maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastpost_kernels import adamw_8bit_, adamw_state, reference

from .kernel_check import Check, Sizes

__all__ = ["optimizer_checks"]

RULE: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STILL: dict[str, Any] = {"lr": 0.0, "betas": (1 - 1e-12, 1 - 1e-12)}  # changes no moment


def optimizer_checks(dtype: torch.dtype, sizes: Sizes, backend: str) -> Iterator[Check]:
    """Two tensors in one launch, one of them with a partial block at its end; then a step that
    must find every level again."""

    def step(weight: Tensor, grad: Tensor, codes: Tensor) -> dict[str, Tensor]:
        weights = [weight.clone(), weight.flatten()[:-3].clone()]
        grads = [grad, grad.flatten()[:-3]]
        states = [adamw_state(w) for w in weights]
        adamw_8bit_(weights, grads, states, steps=[1, 1], backend=backend, **RULE)
        blank = torch.zeros(codes.shape, dtype=dtype, device=codes.device)
        state = adamw_state(blank)
        for moment, absmax in (state[::2], state[1::2]):
            moment.copy_(codes)
            absmax.fill_(0.37)
        adamw_8bit_([blank], [blank.clone()], [state], steps=[1], backend=backend, **STILL)
        return {
            "weight": weights[0],
            "part": weights[1],
            "m levels": state.exp_avg,
            "v levels": state.exp_avg_sq,
        }

    def truly_step(weight: Tensor, grad: Tensor, codes: Tensor) -> dict[str, Tensor]:
        zero = torch.zeros_like(weight)
        found, _, _ = reference.adamw(weight, grad, zero, zero, step=1, **RULE)
        part = found.flatten()[:-3]
        return {"weight": found, "part": part, "m levels": codes, "v levels": codes}

    generator = torch.Generator().manual_seed(2)
    shape = (sizes.rows, sizes.width)
    tensors = {n: torch.randn(shape, generator=generator).to(dtype) for n in ("weight", "grad")}
    tensors["codes"] = torch.cat([torch.arange(256), torch.arange(255, -1, -1)])
    yield Check(
        "adamw_8bit",
        "weights and levels",
        dtype,
        f"{sizes.rows} x {sizes.width}",
        tensors,
        (),
        step,
        truly_step,
        exact=("m levels", "v levels"),
    )
