"""Checks of what scores tokens through a head: log-probabilities and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastpost_kernels import linear_cross_entropy, linear_logprob, reference

from .kernel_check import Check, Sizes

__all__ = ["head_checks"]

TRANSFORM: dict[str, Any] = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}
MOMENTS = ("entropy", "log_sum_sq_probs", "mean_logits", "logsumexp")
DIFFERENTIABLE = ("logprob", "entropy", "logsumexp")
LABEL_SMOOTHING, Z_LOSS = 0.1, 1e-3


def head_checks(dtype: torch.dtype, sizes: Sizes, backend: str) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(1)
    normal = [
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((sizes.rows, sizes.width), (sizes.vocab, sizes.width), (sizes.vocab,))
    ]
    tensors = dict(zip(("hidden", "weight", "bias"), normal, strict=True))
    tensors["hidden"] *= 2 * sizes.width**-0.5
    best = reference.logits(*(x.double() for x in normal)).argmax(-1)
    targets = torch.randint(0, sizes.vocab, (sizes.rows,), generator=generator)
    targets[::4] = best[::4]
    targets[1::3] = -100
    tensors["targets"] = targets
    shape = f"M={sizes.rows} H={sizes.width} V={sizes.vocab}"
    every = ("hidden", "weight", "bias")
    # In bf16 the logits of a tile are rounded, and ties then decide which is the largest.
    exact = ("is_top1",) if dtype == torch.float32 else ()

    def logprob(**given: Any) -> dict[str, Tensor]:
        outputs = (*MOMENTS, *exact)
        budget = sizes.memory_budget
        found = linear_logprob(
            **given, **TRANSFORM, outputs=outputs, backend=backend, memory_budget=budget
        )
        return {name: x for name, x in found._asdict().items() if x is not None}

    def cross_entropy(budget: int | None, smoothing: float) -> Callable[..., dict[str, Tensor]]:
        def run(**given: Any) -> dict[str, Tensor]:
            found = linear_cross_entropy(
                **given,
                **TRANSFORM,
                label_smoothing=smoothing,
                z_loss=Z_LOSS,
                reduction="sum",
                backend=backend,
                memory_budget=budget,
            )
            return {"loss": found.loss}

        return run

    def true_logprob(**given: Any) -> dict[str, Tensor]:
        return reference.linear_logprob(**given, **TRANSFORM)

    def true_cross_entropy(smoothing: float) -> Callable[..., dict[str, Tensor]]:
        def run(**given: Any) -> dict[str, Tensor]:
            options = {**TRANSFORM, "label_smoothing": smoothing, "z_loss": Z_LOSS}
            return {"loss": reference.linear_cross_entropy(**given, **options)}

        return run

    forms: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
        ("no gradient", (), ()),
        ("frozen head", ("hidden",), ("logprob",)),
        ("trained head", every, ("logprob",)),
        ("entropy, frozen head", ("hidden",), DIFFERENTIABLE),
        ("entropy, trained head", every, DIFFERENTIABLE),
    )
    for form, trained, differentiated in forms:
        yield Check(
            "linear_logprob",
            form,
            dtype,
            shape,
            tensors,
            trained,
            logprob,
            true_logprob,
            differentiated,
            exact,
        )
    losses: tuple[tuple[str, tuple[str, ...], int | None, float], ...] = (
        ("frozen head", ("hidden",), sizes.memory_budget, 0.0),
        ("logits kept", every, None, LABEL_SMOOTHING),
        ("logits recomputed", every, sizes.memory_budget // 2, LABEL_SMOOTHING),
    )
    for form, trained, budget, smoothing in losses:
        yield Check(
            "linear_cross_entropy",
            form,
            dtype,
            shape,
            tensors,
            trained,
            cross_entropy(budget, smoothing),
            true_cross_entropy(smoothing),
            ("loss",),
        )
