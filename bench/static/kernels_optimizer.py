"""The optimizer's kernel: AdamW with 8-bit states."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.static.kernel_row import Arguments, Case, Cost, Kernel, anywhere, meta

__all__ = ["KERNELS"]

TRITON = "fastpost_kernels._adamw_8bit_triton"
SIZE = 1 << 24  # elements of each of TENSORS
TENSORS = 4


def _cost(args: Arguments) -> Cost:
    """Weights and states read and written, gradients read."""
    owners: Tensor = args["owners_ptr"]
    elements = owners.numel() * args["BLOCKS"] * args["BLOCK"]
    weight, grad = (args[name].primitive_bitwidth // 8 for name in ("PARAM", "GRAD"))
    state = 2 + 8 / args["BLOCK"] if args["IS_8BIT"] else 8
    return Cost(0, int(elements * (2 * weight + grad + 2 * state)), elements)


def _update(dtype: torch.dtype, grad_dtype: torch.dtype, is_8bit: bool, everything: bool) -> None:
    from fastpost_kernels._adamw_8bit_tables import Lists, Rule
    from fastpost_kernels._adamw_8bit_triton import update
    from fastpost_kernels.adamw_8bit import adamw_state

    params = [meta(SIZE, dtype=dtype) for _ in range(TENSORS)]
    grads = [meta(SIZE, dtype=grad_dtype) for _ in range(TENSORS)]
    states = [adamw_state(param, is_8bit=is_8bit) for param in params]
    scale = meta(1, dtype=torch.float32) if everything else None
    rule = Rule(1, 1e-3, 0.9, 0.999, 1e-8, 0.1, scale, 7 if everything else None)
    lists = Lists(params, grads, *map(list, zip(*states, strict=True)))
    update(lists, rule, list(range(TENSORS)))


BF16, FP32 = torch.bfloat16, torch.float32

KERNELS = (
    Kernel(
        "adamw_8bit", "fastpost", f"{TRITON}:_adamw_8bit_kernel", False, _cost,
        (
            Case("bf16, 8-bit states, to nearest", anywhere(_update, BF16, BF16, True, False)),
            Case("bf16, 8-bit states, every option", anywhere(_update, BF16, BF16, True, True)),
            Case("bf16, fp32 gradients, 8-bit states", anywhere(_update, BF16, FP32, True, True)),
            Case("fp32, 8-bit states", anywhere(_update, FP32, FP32, True, True)),
            Case("bf16, fp32 states", anywhere(_update, BF16, BF16, False, True)),
        ),
        (), {"owners_ptr": 1 << 20, "sizes_ptr": 1 << 48},
    ),
)  # fmt: skip
