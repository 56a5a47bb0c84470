"""What bitsandbytes launches for NF4 weights and for an Adam of 8 bits."""

from __future__ import annotations

import math

import torch

from bench.static.kernel_row import Arguments, Case, Cost, Kernel, anywhere, floats, meta

__all__ = ["KERNELS"]

BNB = "bitsandbytes.backends.triton"
NF4_SHAPE = (14_336, 4096)
QUANT_BLOCK = 64


def _nf4(quantize: bool) -> None:
    from bitsandbytes.backends.triton import kernels_4bit as bnb

    weight = meta(*NF4_SHAPE)
    blocks = weight.numel() // QUANT_BLOCK
    absmax, packed = floats(blocks), meta(weight.numel() // 2, 1, dtype=torch.uint8)
    if quantize:
        bnb.quantize_4bit_blockwise_triton(
            weight, QUANT_BLOCK, "nf4", blocks, absmax, weight.numel(), packed
        )
    else:
        bnb.dequantize_4bit_impl(packed, absmax, QUANT_BLOCK, "nf4", weight.dtype, weight)


def _nf4_cost(args: Arguments) -> Cost:
    count = math.prod(NF4_SHAPE)
    return Cost(0, count * 2 + count // 2 + 4 * count // QUANT_BLOCK, count)


def _adam() -> None:
    from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_impl

    weight, state = meta(*NF4_SHAPE), meta(*NF4_SHAPE, dtype=torch.uint8)
    absmax, code = floats(weight.numel() // 256), floats(256)
    optimizer_update_8bit_blockwise_impl(
        "adam", weight, weight, state, state, 0.9, 0.999, 0.0, 0.0, 1e-8, 10, 1e-6,
        code, code, absmax, absmax, 0.01,
    )  # fmt: skip


def _adam_cost(args: Arguments) -> Cost:
    """Parameter and two 8-bit states read and written, gradient read, two scales a block."""
    count = math.prod(NF4_SHAPE)
    return Cost(0, count * (2 * 2 + 2 + 2 * 2) + 16 * count // 256, count)


KERNELS = (
    Kernel(
        "nf4_linear", "bitsandbytes", f"{BNB}.kernels_4bit:dequant_nf4_kernel", False,
        _nf4_cost, (Case("14336x4096", anywhere(_nf4, False)),),
    ),
    Kernel(
        "nf4_linear", "bitsandbytes", f"{BNB}.kernels_4bit:quantize_nf4_blockwise_kernel", False,
        _nf4_cost, (Case("14336x4096", anywhere(_nf4, True)),),
    ),
    Kernel(
        "adamw_8bit", "bitsandbytes",
        f"{BNB}.kernels_optim:_optimizer_update_2state_8bit_blockwise_triton_kernel", False,
        _adam_cost, (Case("14336x4096", anywhere(_adam)),),
    ),
)  # fmt: skip
