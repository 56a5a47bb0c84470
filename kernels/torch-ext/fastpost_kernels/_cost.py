"""What an op costs: FLOPs and bytes, as formulas.

A `torch.library` op is opaque to `FlopCounterMode` and to memory trackers: without a formula its
FLOPs count as zero and its inner buffers are unseen. Every op of this package registers both here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

__all__ = ["register_costs", "workspace_bytes"]

_WORKSPACE: dict[Any, Callable[..., int]] = {}


def register_costs(
    op: torch.library.CustomOpDef, *, flops: Callable[..., int], workspace: Callable[..., int]
) -> None:
    """Register both formulas of `op`.

    `flops(*args, out_shape, **kwargs)` sees shapes in place of tensors, as torch's counter passes
    them. `workspace(*args, **kwargs)` sees the op's own arguments and returns an upper bound of the
    bytes alive inside the op beyond its arguments and results; no tensor data is read, so fake
    tensors will do.
    """
    packet = op._opoverload.overloadpacket
    register_flop_formula(packet)(flops)
    _WORKSPACE[packet] = workspace


def workspace_bytes(op: Any, *args: Any, **kwargs: Any) -> int:
    """Upper bound, in bytes, of what `op(*args, **kwargs)` allocates beyond its results.

    `op` is what a `TorchDispatchMode` receives (an `OpOverload` or its packet). Raises `KeyError`
    for ops of other packages.
    """
    packet = op.overloadpacket if isinstance(op, torch._ops.OpOverload) else op
    return _WORKSPACE[packet](*args, **kwargs)
