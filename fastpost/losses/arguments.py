"""What every loss refuses: numbers out of range, tensors that would broadcast, masks not boolean.

Two tensors `[P]` and `[P, 1]` broadcast to `[P, P]` and give a plausible wrong loss, so shapes are
compared. Masks must be boolean: an integer mask indexes instead of selecting.
"""

from __future__ import annotations

import torch
from torch import Tensor


def require_positive(name: str, value: float, usual: str) -> None:
    """Refuses a hyperparameter that is zero, negative or nan.

    Raises:
        ValueError: `value` is not a finite number above 0; `usual` says what is customary.
    """
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} was given, expected a number > 0; pass {usual}")


def require_nonnegative(name: str, value: float, usual: str) -> None:
    """Refuses a hyperparameter that is negative or nan.

    Raises:
        ValueError: `value` is not a finite number of at least 0; `usual` says what is customary.
    """
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value} was given, expected a number >= 0; pass {usual}")


def require_between(name: str, value: float, low: float, high: float, usual: str) -> None:
    """Refuses a hyperparameter outside the closed interval `[low, high]`, or nan.

    Raises:
        ValueError: `value` lies outside; `usual` says what is customary.
    """
    if not low <= value <= high:
        raise ValueError(
            f"{name}={value} was given, expected {low} <= {name} <= {high}; pass {usual}"
        )


def require_same_shape(**tensors: Tensor) -> None:
    """Refuses tensors that differ in shape.

    Raises:
        ValueError: the shapes differ; all are named.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"got {shapes}, expected one common shape; squeeze or select the rows")


def require_one_per_row(name: str, per_row: Tensor, tokens: Tensor) -> None:
    """Refuses a tensor that is not `[B]` beside tokens `[B, T]`.

    Raises:
        ValueError: its shape is another.
    """
    if per_row.shape != tokens.shape[:1]:
        raise ValueError(
            f"{name} has shape {list(per_row.shape)}, expected {list(tokens.shape[:1])}: one per "
            f"row of tokens {list(tokens.shape)}; squeeze it or select the rows"
        )


def require_mask(response_mask: Tensor, name: str = "response_mask") -> None:
    """Refuses a mask of numbers.

    Raises:
        TypeError: the mask is not boolean.
    """
    if response_mask.dtype != torch.bool:
        raise TypeError(
            f"{name} has dtype {response_mask.dtype}, expected torch.bool (True = scored); "
            f"pass {name}.bool()"
        )


__all__ = [
    "require_between",
    "require_mask",
    "require_nonnegative",
    "require_one_per_row",
    "require_positive",
    "require_same_shape",
]
