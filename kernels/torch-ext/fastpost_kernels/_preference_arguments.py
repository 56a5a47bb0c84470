"""What preference_logratio is given: rows in front of a head, cut into sequences; its checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._linear_arguments import check_tensors

__all__ = ["HeadRows", "check_sequences", "reference_arguments"]


class HeadRows(NamedTuple):
    """Rows in front of a head. Targets of -100 are not scored: 0, not counted, no gradient."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [M] int64
    bias: Tensor | None = None  # [V]
    places: Tensor | None = None  # [N] int64, the row at each place; None: place i is row i


def reference_arguments(
    policy: HeadRows, reference: HeadRows | Tensor, cu_seqlens: Tensor, num_places: int
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """The sums if they are given, and the op's five arguments of a reference."""
    if isinstance(reference, Tensor):
        if reference.shape != (cu_seqlens.shape[0] - 1,):
            raise ValueError(
                f"a reference given as sums must be [S] = [{cu_seqlens.shape[0] - 1}], got "
                f"{tuple(reference.shape)}"
            )
        return reference, (None,) * 5
    hidden, weight, targets, bias, places = reference
    check_tensors(hidden, weight, targets, bias)
    if check_sequences("reference", reference, cu_seqlens, None) != num_places:
        raise ValueError(
            f"policy and reference must have the same places, got {num_places} and "
            f"{hidden.shape[0] if places is None else places.shape[0]}"
        )
    if hidden.device != policy.hidden.device:
        raise ValueError(
            f"the reference's rows are on {hidden.device}, the policy's on "
            f"{policy.hidden.device}; move them to one device"
        )
    if weight is policy.weight and bias is policy.bias:
        return None, (hidden.detach(), targets, None, None, places)
    own_bias = None if bias is None else bias.detach()
    return None, (hidden.detach(), targets, weight.detach(), own_bias, places)


def check_sequences(
    side: str, rows: HeadRows, cu_seqlens: Tensor, token_weights: Tensor | None
) -> int:
    """Shapes and dtypes of what cuts rows into sequences; the number of places."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(
            "cu_seqlens must be [S + 1] with an even number S of sequences, chosen before "
            f"rejected, got shape {tuple(cu_seqlens.shape)}"
        )
    num_places = rows.hidden.shape[0]
    integers: dict[str, Tensor | None] = {"cu_seqlens": cu_seqlens, "places": rows.places}
    for name, tensor in integers.items():
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} of the {side} must be int32 or int64, got {tensor.dtype}")
        if tensor.device != rows.hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device}, hidden of the {side} on {rows.hidden.device}; "
                "move them to one device"
            )
    if rows.places is not None:
        if rows.places.dim() != 1:
            raise ValueError(
                f"places of the {side} must be [N], got shape {tuple(rows.places.shape)}"
            )
        num_places = rows.places.shape[0]
    if token_weights is not None and token_weights.shape != (num_places,):
        raise ValueError(
            f"token_weights must be [N] = [{num_places}], one per place, got "
            f"{tuple(token_weights.shape)}"
        )
    return num_places
