"""A linear layer on a 4-bit NormalFloat weight, with its low-rank adapter in the same call.

    y  = x W^T + bias + s u B^T,  W = level[nibble] * absmax[block],  u = drop(x) A^T
    dx = dy W + drop'(du A),  du = s dy B,  dB = s dy^T u,  dA = du^T drop(x);  W is frozen

Strategy. With many rows the weight is unpacked tile by tile into one buffer of the size of a cache,
and the library's GEMM finds it there: the forward goes by slices of outputs and the backward by
slices of inputs, so every slice of a result is one whole product, rounded once. A 16-bit copy of
the weight never exists, nor is anything of it kept for the backward: x (if the adapter needs it)
and u [M, r] are. With few rows (decoding) on GPUs one Triton GEMM unpacks as it goes and
reads 4 bits a weight; how many rows are few is 64, or what `fastpost tune` measured. bitsandbytes
unpacks whole weights before every product.
Rejected: unpacking inside the GEMM for many rows: each block of 128 rows would unpack W again, 64
times at M 8192.

FLOPs: 2 M N K each way, and the adapter's. Bytes beyond results: one tile (`TILE_BYTES`), du.
Legend: M rows, K inputs, N outputs, r rank. Format and sources: `_nf4_format.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._adapter_passes import dropped
from ._adapter_products import check_dropout, rank_gradients
from ._choices import choose, layer_shape
from ._cost import register_costs
from ._device import BACKENDS, HAS_TRITON, resolve_backend
from ._eager_node import DirectOp
from ._namespace import add_op_namespace_prefix
from ._nf4_format import (
    BLOCK_SIZES,
    NESTED_BLOCK,
    Nf4Weight,
    absmax_of,
    nested_levels,
    quantize_plain,
)
from ._nf4_unpack import WeightTiles, as_it_lies, tile_elements, unpack

if HAS_TRITON:
    from ._nf4_triton import multiply

__all__ = ["nf4_dequantize", "nf4_linear", "nf4_quantize"]


def _weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
) -> Nf4Weight:
    size = (shape[0], shape[1])
    return Nf4Weight(packed, absmax, size, block_size, nested_absmax, nested_code, offset)


@torch.library.custom_op(add_op_namespace_prefix("nf4_dequantize"), mutates_args=())
def dequantize_op(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    backend = resolve_backend(backend, packed.device, dtype)
    weight = _weight(packed, absmax, nested_absmax, nested_code, offset, shape, block_size)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    whole = (slice(0, shape[0]), slice(0, shape[1]))
    with torch.cuda.device_of(packed):
        return unpack(as_it_lies(weight), whole, out, backend)


@dequantize_op.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _forward(
    x: Tensor,  # [M, K]
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: list[int],  # N, K
    block_size: int,
    bias: Tensor | None,  # [N]
    a: Tensor | None,  # [r, K]
    b: Tensor | None,  # [N, r]
    scale: float,
    dropout_p: float,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y [M, N] and u [M, r]."""
    chosen = resolve_backend(backend, x.device, x.dtype)
    weight = _weight(packed, absmax, nested_absmax, nested_code, offset, shape, block_size)
    bias = None if bias is None else bias.to(x.dtype)
    with torch.cuda.device_of(x):
        if chosen == "triton" and shape[1] % 2 == 0 and len(x) <= _fused_rows(weight, x):
            flat = packed.reshape(-1).view(torch.uint8)
            y = multiply(x, flat, absmax_of(weight), block_size, shape[0], bias)
        else:
            y = x.new_empty(len(x), shape[0])
            for part, tile in WeightTiles(weight, x.dtype, chosen).by_rows():
                if bias is None:
                    torch.mm(x, tile.t(), out=y[:, part])
                else:
                    torch.addmm(bias[part], x, tile.t(), out=y[:, part])
        if a is None or b is None:
            return y, x.new_empty(len(x), 0)
        u = dropped(x, dropout_p, seed, chosen) @ a.to(x.dtype).t()
        return y.addmm_(u, b.to(x.dtype).t(), alpha=scale), u


nf4_linear_fwd = torch.library.custom_op(
    add_op_namespace_prefix("nf4_linear_fwd"), mutates_args=()
)(_forward)


def _fused_rows(weight: Nf4Weight, x: Tensor) -> int:
    return int(choose("nf4_rows", x.device, layer_shape(weight.shape, x.dtype)))


@nf4_linear_fwd.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    return x.new_empty(rows, shape[0]), x.new_empty(rows, 0 if a is None else a.shape[0])


def _gradients(
    grad: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K], where d A is needed
    u: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    backend: str,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d x, d A and d B in x's dtype; those without a use have no elements."""
    backend = resolve_backend(backend, grad.device, grad.dtype)
    d_x, d_a, d_b = (grad.new_empty(0) for _ in range(3))
    d_u = None
    with torch.cuda.device_of(grad):
        if b is not None:
            d_u = torch.empty_like(u)
            d_b = rank_gradients(grad, u, b, scale, d_u, True)
            if x is not None:
                d_a = d_u.t().contiguous() @ dropped(x, dropout_p, seed, backend)
        if need_x:
            d_x = grad.new_empty(len(grad), shape[1])
            weight = _weight(packed, absmax, nested_absmax, nested_code, offset, shape, block_size)
            for part, tile in WeightTiles(weight, grad.dtype, backend).by_columns():
                torch.mm(grad, tile, out=d_x[:, part])
            if d_u is not None and a is not None and dropout_p == 0:
                d_x.addmm_(d_u, a.to(grad.dtype))
            elif d_u is not None and a is not None:
                d_x += dropped(d_u @ a.to(grad.dtype), dropout_p, seed, backend)
    return d_x, d_a, d_b


nf4_linear_bwd = torch.library.custom_op(
    add_op_namespace_prefix("nf4_linear_bwd"), mutates_args=()
)(_gradients)


@nf4_linear_bwd.register_fake
def _(
    grad: Tensor,
    x: Tensor | None,
    u: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    backend: str,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty((grad.shape[0], shape[1]) if need_x else (0,)),
        grad.new_empty((0,) if a is None or x is None else a.shape),
        grad.new_empty((0,) if b is None else b.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight, shape, block_size, bias, a, b, scale, dropout_p, seed, backend = inputs
    needs_a = a is not None and ctx.needs_input_grad[9]
    ctx.save_for_backward(x if needs_a else None, output[1], *weight, a, b)
    ctx.layout, ctx.settings = (shape, block_size), (scale, dropout_p, seed, backend)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, u, *weight, a, b = ctx.saved_tensors
    need_x, need_bias, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 8, 9, 10))
    grad = grad.contiguous()
    d_x, d_a, d_b = _call_gradients(grad, x, u, *weight, *ctx.layout, a, b, *ctx.settings, need_x)
    return (
        d_x if need_x else None,
        *(None,) * 7,
        grad.sum(0).to(ctx.bias_dtype) if need_bias else None,
        d_a.to(a.dtype) if need_a else None,
        d_b.to(b.dtype) if need_b else None,
        *(None,) * 4,
    )


_call_gradients = DirectOp(nf4_linear_bwd, _gradients)
_call_forward = DirectOp(nf4_linear_fwd, _forward, (0, 8, 9, 10), _setup_context, _backward)


def _forward_flops(x: torch.Size, *args: Any, **kwargs: Any) -> int:
    shape, a, b = args[5], args[8], args[9]
    adapter = 0 if a is None else math.prod(a) + math.prod(b)
    return 2 * x[0] * (math.prod(shape) + adapter)


def _backward_flops(grad: torch.Size, x: torch.Size | None, *args: Any, **kwargs: Any) -> int:
    shape, a, b, need_x = args[6], args[8], args[9], args[-1]
    adapter = 0 if a is None else 2 * math.prod(b) + math.prod(a) * (need_x + (x is not None))
    return 2 * grad[0] * (math.prod(shape) * need_x + adapter)


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0


def _unpack_bytes(absmax: Tensor, shape: list[int], backend: str) -> int:
    """absmax in float32 with its indices, and all of torch's unpacking where it has to serve."""
    plain = 24 * math.prod(shape) if backend == "torch" or shape[1] % 2 else 0
    return plain + 24 * absmax.numel()


def _dequantize_workspace(packed: Tensor, absmax: Tensor, *args: Any) -> int:
    return _unpack_bytes(absmax, args[3], args[6])


def _products_workspace(
    rows: Tensor, absmax: Tensor, shape: list[int], block_size: int, settings: tuple[Any, ...]
) -> int:
    a, b, _, dropout_p, _, backend = settings
    elements = tile_elements((shape[0], shape[1]), block_size, rows.dtype, rows.device.type)
    tile = (elements + block_size * shape[0]) * rows.itemsize
    rank = 0 if a is None else a.shape[0]
    casts = 0 if a is None else 3 * (a.numel() + b.numel()) * rows.itemsize
    drop = len(rows) * shape[1] * (2 * rows.itemsize + (96 if backend == "torch" else 0))
    adapter = 4 * len(rows) * rank * rows.itemsize + casts + (drop if dropout_p else 0)
    return tile + adapter + _unpack_bytes(absmax, shape, backend) + shape[0] * rows.itemsize


def _forward_workspace(x: Tensor, packed: Tensor, absmax: Tensor, *args: Any) -> int:
    shape, block_size = args[3:5]
    return _products_workspace(x, absmax, shape, block_size, args[6:])


def _backward_workspace(grad: Tensor, x: Any, u: Any, packed: Any, *args: Any) -> int:
    absmax, shape, block_size = args[0], *args[4:6]
    return _products_workspace(grad, absmax, shape, block_size, args[6:-1])


register_costs(dequantize_op, flops=_no_flops, workspace=_dequantize_workspace)
register_costs(nf4_linear_fwd, flops=_forward_flops, workspace=_forward_workspace)
register_costs(nf4_linear_bwd, flops=_backward_flops, workspace=_backward_workspace)


def nf4_quantize(
    weight: Tensor,  # [N, K]
    *,
    block_size: int = 64,
    double_quant: bool = True,
    storage: torch.dtype = torch.uint8,
) -> Nf4Weight:
    """`weight` in 4-bit NormalFloat, bit-equal to bitsandbytes' `quantize_4bit` on CPUs.

    Args:
        weight: [N, K], float32, float16 or bfloat16.
        block_size: elements that share an absmax, one of BLOCK_SIZES.
        double_quant: keep absmax as bytes too: 0.127 bits an element instead of 0.5.
        storage: dtype that the bytes are viewed as; FSDP2 shards floating dtypes only.

    Returns:
        `Nf4Weight` with `packed` [bytes, 1] in `storage`, as bitsandbytes shapes it.

    Raises:
        ValueError: not a matrix, another block size, bytes that do not fill `storage`.
        TypeError: a dtype other than those.
    """
    if weight.dim() != 2:
        raise ValueError(f"expected weight [N, K], got {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    found = quantize_plain(weight.detach(), block_size, double_quant)
    if len(found.packed) % storage.itemsize:
        raise ValueError(
            f"{len(found.packed)} bytes do not fill elements of {storage}; use torch.uint8"
        )
    return found._replace(packed=found.packed.view(storage)[:, None])


def nf4_dequantize(
    weight: Nf4Weight, dtype: torch.dtype = torch.bfloat16, *, backend: str = "auto"
) -> Tensor:
    """[N, K] in `dtype`: level times absmax in float32, rounded once.

    Raises:
        ValueError: bytes or absmax that do not fit the shape; a backend that cannot run here.
    """
    return dequantize_op(*_parts(weight, backend), dtype, backend)


def nf4_linear(
    x: Tensor,  # [..., K]
    weight: Nf4Weight,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    a: Tensor | None = None,  # [r, K]
    b: Tensor | None = None,  # [N, r]
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`x W^T + bias + scale (dropout(x) A^T) B^T`, [..., N], for a frozen 4-bit W.

    Args:
        x: [..., K], float32, bfloat16 or float16. Under autocast it is cast first.
        weight: from `nf4_quantize`, or bitsandbytes' bytes.
        bias: [N] or None.
        a, b, scale, dropout_p, seed: the adapter, as in `lora_linear`; both matrices or none.
        backend: "auto", "triton", "cpp" or "torch": what unpacks.

    Returns:
        [..., N] in x's dtype, differentiable in x, bias, a and b.

    Raises:
        ValueError: shapes that do not fit, one matrix of the adapter alone, dropout without a seed,
            a backend that cannot run here.
    """
    parts = _parts(weight, backend)
    outputs, inputs = weight.shape
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"weight is [N={outputs}, K={inputs}]: got x {tuple(x.shape)}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"expected bias [{outputs}] or None, got {tuple(bias.shape)}")
    if (a is None) != (b is None):
        raise ValueError("give both a and b, or none of them")
    if a is not None and b is not None:
        rank = len(a)
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise ValueError(
                f"expected a [r, {inputs}] and b [{outputs}, r], got {tuple(a.shape)} and "
                f"{tuple(b.shape)}"
            )
    seed = check_dropout(dropout_p, seed)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    settings = (float(scale), float(dropout_p), seed, backend)
    # a view is two more nodes of autograd
    flat = x if x.dim() == 2 else x.reshape(-1, inputs)
    y, _ = _call_forward(flat, *parts, bias, a, b, *settings)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], outputs)


def _parts(weight: Nf4Weight, backend: str) -> tuple[Any, ...]:
    """The op's arguments of `weight`, checked."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    count = math.prod(weight.shape)
    num_bytes, blocks = -(-count // 2), -(-count // weight.block_size)
    held = weight.packed.numel() * weight.packed.itemsize
    if weight.block_size not in BLOCK_SIZES or held != num_bytes or len(weight.absmax) != blocks:
        raise ValueError(
            f"a weight {weight.shape} in blocks of {weight.block_size} (one of {BLOCK_SIZES}) has "
            f"{num_bytes} bytes and {blocks} absmax, got {held} and {len(weight.absmax)}"
        )
    nested, code = weight.nested_absmax, weight.nested_code
    if (nested is None) != (weight.absmax.dtype != torch.uint8):
        raise ValueError(
            f"absmax is {weight.absmax.dtype} with nested_absmax "
            f"{'missing' if nested is None else 'given'}: absmax is uint8 with double quantisation "
            "and float32 without"
        )
    if nested is not None:
        if code is None or weight.offset is None or len(nested) != -(-blocks // NESTED_BLOCK):
            raise ValueError(
                f"double quantisation needs nested_code [256], offset and nested_absmax "
                f"[{-(-blocks // NESTED_BLOCK)}], got {tuple(nested.shape)}"
            )
        if code.shape != nested_levels().shape:
            raise ValueError(f"nested_code must be [256], got {tuple(code.shape)}")
    shape = list(weight.shape)
    return weight.packed, weight.absmax, nested, code, weight.offset, shape, weight.block_size
