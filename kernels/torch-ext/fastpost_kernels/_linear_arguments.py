"""Checks and defaults shared by linear_logprob and linear_cross_entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._device import BACKENDS
from ._lora_head import LoraHead
from ._vocab_passes import LogitTransform
from ._vocab_tiles import default_budget

__all__ = [
    "check_filter",
    "check_outputs",
    "check_tensors",
    "make_lora",
    "resolve_settings",
    "resolve_transform",
]

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_tensors(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora: LoraHead | None = None,
) -> None:
    """Shapes, dtypes and devices of all tensors; raises `ValueError` or `TypeError`."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [M, H] and weight [V, H], got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}; flatten batch and time, and pass the head's weight as stored"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be [M] = [{hidden.shape[0]}] like hidden, got {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}; use targets.long()")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [V] = [{weight.shape[0]}] like weight, got {tuple(bias.shape)}"
        )
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    if lora is not None:
        _check_lora(lora, weight)
        named |= {"lora.a": lora.a, "lora.b": lora.b}
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype not in COMPUTE_DTYPES:
            raise TypeError(
                f"{name} must be one of {COMPUTE_DTYPES}, got {tensor.dtype}; float16 overflows in "
                "the exponentials, use bfloat16"
            )
    for name, tensor in (named | {"targets": targets}).items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device}, hidden on {hidden.device}; move them to one device"
            )


def _check_lora(lora: LoraHead, weight: Tensor) -> None:
    vocab, width = weight.shape
    rank = lora.a.shape[0] if lora.a.dim() == 2 else 0
    if rank == 0 or lora.a.shape != (rank, width) or lora.b.shape != (vocab, rank):
        raise ValueError(
            f"lora must be a [r, H] = [r, {width}] and b [V, r] = [{vocab}, r] of one rank r > 0, "
            f"got {tuple(lora.a.shape)} and {tuple(lora.b.shape)}; pass lora_A.weight and "
            "lora_B.weight as PEFT stores them"
        )
    if not math.isfinite(lora.scale):
        raise ValueError(f"lora.scale must be finite, got {lora.scale}")


def make_lora(a: Tensor | None, b: Tensor | None, scale: float) -> LoraHead | None:
    """What an op's schema takes apart, put together again."""
    return None if a is None or b is None else LoraHead(a, b, scale)


def check_filter(filter_eps: float | None, label_smoothing: float = 0.0) -> None:
    """A threshold in (0, 1), and nothing that it would drop as a whole."""
    if filter_eps is None:
        return
    if not 0 < filter_eps < 1:
        raise ValueError(
            f"filter_eps must be in (0, 1) or None, got {filter_eps}; 2**-12 is what 16-bit "
            "gradients resolve"
        )
    if label_smoothing:
        raise ValueError(
            f"label_smoothing={label_smoothing} spreads small gradients over the vocabulary, which "
            f"filter_eps={filter_eps} drops; use one of them"
        )


def resolve_transform(
    logit_scale: float, softcap: float | None, temperature: float
) -> LogitTransform:
    """The transform, with every factor positive and finite."""
    given = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
    for name, value in given.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    return LogitTransform(
        float(logit_scale), None if softcap is None else float(softcap), float(temperature)
    )


def resolve_settings(
    hidden: Tensor, backend: str, compute_dtype: torch.dtype | None, memory_budget: int | None
) -> tuple[str, torch.dtype, int]:
    """(backend, compute dtype, budget in bytes) with their defaults filled in.

    "auto" stays: what this machine offers is asked when the op runs, not when it is traced.

    The compute dtype is the one asked for, else autocast's where autocast is on (float64 excepted,
    as autocast itself does), else that of `hidden`.
    """
    device = hidden.device.type
    if compute_dtype is None:
        compute_dtype = hidden.dtype
        if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
            compute_dtype = torch.get_autocast_dtype(device)
    if compute_dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"compute_dtype (here from the argument or from autocast) must be one of "
            f"{COMPUTE_DTYPES}, got {compute_dtype}; use bfloat16"
        )
    if memory_budget is None:
        memory_budget = default_budget(device)
    if memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return backend, compute_dtype, memory_budget


def check_outputs(outputs: Sequence[str], allowed: tuple[str, ...]) -> None:
    """Every name asked for must be one of `allowed`."""
    unknown = [name for name in outputs if name not in allowed]
    if unknown or isinstance(outputs, str):
        raise ValueError(f"outputs must be a sequence of names out of {allowed}, got {outputs!r}")
