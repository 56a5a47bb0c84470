"""Adapted and quantised linear layers: LoRA's extended GEMM, their element-wise passes, NF4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.static.kernel_row import (
    MAX_HIDDEN,
    MAX_ROWS,
    MAX_VOCAB,
    ROWS,
    WIDTHS,
    Arguments,
    Case,
    Cost,
    Kernel,
    anywhere,
    by,
    floats,
    meta,
)

__all__ = ["KERNELS", "RANK"]

RANK = 64
MAX_INNER = 4 * MAX_HIDDEN  # of a gated MLP
GEMM = "fastpost_kernels._extended_gemm_triton"
NF4 = "fastpost_kernels._nf4_triton"
PASSES = "fastpost_kernels._adapter_passes_triton"


def _gemm_cost(args: Arguments) -> Cost:
    rows, width, inner, rank = (args[name] for name in ("rows", "width", "inner", "rank"))
    elements = rows * (inner + rank + width) + width * (inner + rank)
    itemsize = args["x_ptr"].itemsize
    return Cost(2 * rows * width * (inner + rank), elements * itemsize, rows * width)


def _elements_cost(args: Arguments, *names: str) -> Cost:
    tensors: list[Tensor] = [args[f"{name}_ptr"] for name in names]
    return Cost(0, sum(t.numel() * t.itemsize for t in tensors), tensors[0].numel())


def _dropout_cost(args: Arguments) -> Cost:
    return _elements_cost(args, "x", "out")


def _scale_cost(args: Arguments) -> Cost:
    return _elements_cost(args, "z", "out", "scale")


def _scale_backward_cost(args: Arguments) -> Cost:
    return _elements_cost(args, "grad", "z", "d_z", "scale", "partials")


def _forward(width: int) -> None:
    from fastpost_kernels._extended_gemm_triton import extended_gemm

    x, weight = meta(ROWS, width), meta(width, width)
    a_x, b = meta(ROWS, RANK), meta(width, RANK)
    extended_gemm(x, weight.t(), a_x, b.t(), meta(width))


def _input_gradient(width: int) -> None:
    from fastpost_kernels._extended_gemm_triton import extended_gemm

    extended_gemm(meta(ROWS, width), meta(width, width), meta(ROWS, RANK), meta(RANK, width), None)


def _unpack_cost(args: Arguments) -> Cost:
    out: Tensor = args["out_ptr"]
    elements = out.numel()
    absmax = 4 * elements // args["BLOCK_SIZE"]
    return Cost(0, elements // 2 + absmax + elements * out.itemsize, elements)


def _decode_cost(args: Arguments) -> Cost:
    rows, width, inner = (args[name] for name in ("rows", "width", "inner"))
    weight = width * inner // 2 + 4 * width * inner // args["BLOCK_SIZE"]
    moved = weight + rows * (inner + width) * args["x_ptr"].itemsize
    return Cost(2 * rows * width * inner, moved, width * inner)


def _nf4(width: int) -> tuple[Tensor, Tensor]:
    """Bytes and absmax of a weight [width, width]."""
    return meta(width * width // 2, dtype=torch.uint8), floats(width * width // 64)


def _unpack(width: int, columns: bool) -> None:
    from fastpost_kernels._nf4_triton import unpack

    out = meta(width, 1024) if columns else meta(1, 1024 * width)
    unpack(*_nf4(width), 64, 0, width if columns else 0, out)


def _decode(width: int, rows: int) -> None:
    from fastpost_kernels._nf4_triton import multiply

    multiply(meta(rows, width), *_nf4(width), 64, width, None)


def _pass(name: str, *arguments: Any) -> None:
    from fastpost_kernels import _adapter_passes_triton as passes

    getattr(passes, name)(*arguments)


def _passes(name: str, *after: Any, tensors: int = 1) -> tuple[Case, ...]:
    """At every hidden width; `after` follows the [M, H] tensors."""

    def launch(width: int) -> Any:
        vectors = [floats(width) if value == "column" else value for value in after]
        return anywhere(_pass, name, *(meta(ROWS, width) for _ in range(tensors)), *vectors)

    return by(WIDTHS, "H", launch)


LIMITS = {
    "rows": MAX_ROWS,
    "width": MAX_INNER,
    "inner": MAX_INNER,
    "rank": 1024,
    "program_id(0)": MAX_ROWS,  # of rows, or of the GEMM's blocks of 128 x 128
    "stride_x": MAX_INNER,
    "stride_y_k": MAX_INNER,
    "stride_y_n": MAX_INNER,
    "stride_u": MAX_INNER,
    "stride_v_k": MAX_INNER,
    "stride_v_n": MAX_INNER,
    "stride_out": MAX_INNER,
    "stride_grad": MAX_INNER,
    "stride_z": MAX_INNER,
    "stride_d_z": MAX_INNER,
}

NF4_LIMITS = {
    "program_id(0)": MAX_VOCAB,
    "stride_bytes": MAX_INNER,
    "stride_out": MAX_INNER,
}

KERNELS = (
    Kernel(
        "lora_linear", "fastpost", f"{GEMM}:_extended_gemm_kernel", True, _gemm_cost,
        tuple(
            Case(f"H {width}, rank {RANK}, {what}", anywhere(launch, width))
            for width in WIDTHS
            for what, launch in (("forward", _forward), ("d x", _input_gradient))
        ),
        (), LIMITS,
    ),
    Kernel(
        "lora_linear", "fastpost", f"{PASSES}:_adapter_dropout_kernel", False, _dropout_cost,
        _passes("dropout", 2**40 + 1, 429_496_730, 1.11), (), LIMITS,
    ),
    Kernel(
        "dora_linear", "fastpost", f"{PASSES}:_column_scale_forward_kernel", False, _scale_cost,
        _passes("column_scale_forward", "column", "column"), (), LIMITS,
    ),
    Kernel(
        "dora_linear", "fastpost", f"{PASSES}:_column_scale_backward_kernel", False,
        _scale_backward_cost, _passes("column_scale_backward", "column", True, tensors=2), (),
        LIMITS,
    ),
    Kernel(
        "nf4_linear", "fastpost", f"{NF4}:_nf4_unpack_kernel", False, _unpack_cost,
        tuple(
            Case(f"H {width}, {name}", anywhere(_unpack, width, name == "columns"))
            for width in WIDTHS
            for name in ("rows", "columns")
        ),
        (), NF4_LIMITS,
    ),
    Kernel(
        "nf4_linear", "fastpost", f"{NF4}:_nf4_gemm_kernel", True, _decode_cost,
        tuple(
            Case(f"H {width}, M {rows}", anywhere(_decode, width, rows))
            for width in WIDTHS
            for rows in (1, 64)
        ),
        (), LIMITS,
    ),
)  # fmt: skip
