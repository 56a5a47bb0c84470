"""A linear layer with a low-rank adapter: the adapter costs its own FLOPs and no pass over y.

    y  = x W^T + bias + s u B^T,        u = drop(x) A^T
    du = s dy B,   dx = dy W + drop'(du A),   dB = s dy^T u,   dA = du^T drop(x),   dW = dy^T x

Strategy. Eager code runs three layers and joins them: it writes the adapter's result, scales it and
adds it, three passes over y, and as many over x backwards. Here the second product is added by the
GEMM that makes it (`addmm`: y is read and written once more), or, in Triton, it is the same GEMM
going on over A's rank (a K-extension: y is written once). The latter is taken only where asked for
by name, or where `fastpost tune` measured it faster (`_choices.py`): no Triton GEMM is preferred to
a library's unmeasured.
Kept for the backward: x and u, [M, r]. Dropout acts on the adapter's input alone and is drawn again
in the backward from (seed, row, column), see `_philox.py`: no mask and no dropped copy is kept.
dA and dB are computed as r-row products, whose left operand is a transposed copy of u or du: the
product over M with the wide operand transposed is several times slower in CPU libraries.
Rejected: merging W + sBA before the product (M < N layers pay more for the merge than for the
adapter; and 4-bit weights cannot).

Several adapters over one x (q, k and v; gate and up) share its pass: `lora_linears` multiplies x
with their A's concatenated.

FLOPs: forward 2 M (K N + r (K + N)); backward the same for dx, plus 2 M r (K + N) for dA and dB.
Bytes beyond results: casts of A and B, du, a dropped copy of x [M, K] while it is used.
Legend: M rows, K inputs, N outputs, r rank.
Source: Hu et al., "LoRA" (arXiv:2106.09685), equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._adapter_passes import dropped
from ._adapter_products import check_dropout, rank_gradients
from ._choices import adapted_shape, choose
from ._cost import register_costs
from ._device import BACKENDS, HAS_TRITON, resolve_backend
from ._eager_node import DirectOp
from ._namespace import add_op_namespace_prefix

if HAS_TRITON:
    from ._extended_gemm_triton import extended_gemm

__all__ = ["LoraWeights", "lora_linear", "lora_linears"]


class LoraWeights(NamedTuple):
    """One layer and its adapter, for `lora_linears`."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    scale: float


def _product(
    x: Tensor, y: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, scale: float, backend: str
) -> Tensor:
    """x y + bias + scale u v, for y [K, N] and v [r, N]."""
    if backend == "auto" and _extends(x, y, u):
        backend = "triton"
    if backend == "triton":
        resolve_backend(backend, x.device, x.dtype)
        return extended_gemm(x, y, u * scale, v, bias)
    out = x @ y if bias is None else torch.addmm(bias, x, y)
    return out.addmm_(u, v, alpha=scale)


def _extends(x: Tensor, y: Tensor, u: Tensor) -> bool:
    """Whether one GEMM over K and r was measured faster here than the library's two."""
    if not HAS_TRITON or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    shape = adapted_shape(len(x), y.shape, u.shape[1], x.dtype)
    return choose("lora_linear", x.device, shape) == "triton"


def _slices(bs: Sequence[Tensor]) -> list[slice]:
    """Columns of u that belong to each layer."""
    ends = [sum(b.shape[1] for b in bs[: i + 1]) for i in range(len(bs))]
    return [slice(end - b.shape[1], end) for end, b in zip(ends, bs, strict=True)]


# Lists of tensors keep one length for all of a layer's arguments: an absent bias has no elements.
def _forward(
    x: Tensor,  # [M, K]
    weights: list[Tensor],  # [N_i, K]
    biases: list[Tensor],  # [N_i] or [0]
    a: Tensor,  # [sum of r_i, K]
    bs: list[Tensor],  # [N_i, r_i]
    scales: list[float],
    dropout_p: float,
    seed: int,
    backend: str,
) -> list[Tensor]:
    """y_i [M, N_i] of every layer, then u [M, sum of r_i]."""
    with torch.cuda.device_of(x):
        u = dropped(x, dropout_p, seed, backend) @ a.to(x.dtype).t()
        layers = zip(weights, biases, bs, scales, _slices(bs), strict=True)
        found = []
        for weight, bias, b, scale, part in layers:
            y, v = weight.to(x.dtype).t(), b.to(x.dtype).t()
            bias_or_none = bias.to(x.dtype) if len(bias) else None
            found.append(_product(x, y, bias_or_none, u[:, part], v, scale, backend))
    return [*found, u]


lora_linear_fwd = torch.library.custom_op(
    add_op_namespace_prefix("lora_linear_fwd"), mutates_args=()
)(_forward)


@lora_linear_fwd.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    a: Tensor,
    bs: list[Tensor],
    scales: list[float],
    dropout_p: float,
    seed: int,
    backend: str,
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], len(matrix)) for matrix in (*weights, a)]


def _gradients(
    grads: list[Tensor],  # [M, N_i]
    x: Tensor,
    u: Tensor,
    weights: list[Tensor],
    a: Tensor,
    bs: list[Tensor],
    scales: list[float],
    dropout_p: float,
    seed: int,
    backend: str,
    need_x: bool,
    need_a: bool,
    need_weights: list[bool],
    need_bs: list[bool],
) -> list[Tensor]:
    """d x, d A, then d W_i, then d B_i, in x's dtype; those not needed have no elements."""
    with torch.cuda.device_of(x):
        d_u = torch.empty_like(u)
        d_bs, d_weights = [], []
        layers = zip(grads, weights, bs, scales, _slices(bs), need_weights, need_bs, strict=True)
        for grad, _, b, scale, part, need_weight, need_b in layers:
            d_weights.append(grad.t() @ x if need_weight else x.new_empty(0))
            d_bs.append(rank_gradients(grad, u[:, part], b, scale, d_u[:, part], need_b))
        d_a = x.new_empty(0)
        if need_a:
            d_a = d_u.t().contiguous() @ dropped(x, dropout_p, seed, backend)
        d_x = x.new_empty(0)
        if need_x:
            d_x = _input_gradient(grads, weights, d_u, a.to(x.dtype), dropout_p, seed, backend)
    return [d_x, d_a, *d_weights, *d_bs]


def _input_gradient(
    grads: list[Tensor],
    weights: list[Tensor],
    d_u: Tensor,
    a: Tensor,
    dropout_p: float,
    seed: int,
    backend: str,
) -> Tensor:
    first = weights[0].to(d_u.dtype)
    if dropout_p == 0:
        d_x = _product(grads[0], first, None, d_u, a, 1.0, backend)
    else:
        d_x = grads[0] @ first
        d_x += dropped(d_u @ a, dropout_p, seed, backend)
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        d_x.addmm_(grad, weight.to(d_u.dtype))
    return d_x


lora_linear_bwd = torch.library.custom_op(
    add_op_namespace_prefix("lora_linear_bwd"), mutates_args=()
)(_gradients)


@lora_linear_bwd.register_fake
def _(
    grads: list[Tensor],
    x: Tensor,
    u: Tensor,
    weights: list[Tensor],
    a: Tensor,
    bs: list[Tensor],
    scales: list[float],
    dropout_p: float,
    seed: int,
    backend: str,
    need_x: bool,
    need_a: bool,
    need_weights: list[bool],
    need_bs: list[bool],
) -> list[Tensor]:
    matrices = zip((x, a, *weights, *bs), (need_x, need_a, *need_weights, *need_bs), strict=True)
    return [x.new_empty(matrix.shape if needed else (0,)) for matrix, needed in matrices]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, a, bs, *settings = inputs
    ctx.save_for_backward(x, output[-1], a, *weights, *biases, *bs)
    ctx.count, ctx.settings = len(weights), settings


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    count = ctx.count
    x, u, a, *matrices = ctx.saved_tensors
    weights, biases, bs = (matrices[i * count : (i + 1) * count] for i in range(3))
    need_x, need_weights, need_biases, need_a, need_bs = ctx.needs_input_grad[:5]
    given = [
        x.new_zeros(len(x), len(weight)) if grad is None else grad.contiguous()
        for grad, weight in zip(grads[:count], weights, strict=True)
    ]
    found = _call_gradients(
        given,
        x,
        u,
        weights,
        a,
        bs,
        *ctx.settings,
        need_x,
        need_a,
        need_weights,
        need_bs,
    )
    d_x, d_a, *d_matrices = found
    column_sums = [
        grad.sum(0) if needed else grad for grad, needed in zip(given, need_biases, strict=True)
    ]
    return (
        d_x if need_x else None,
        _wanted(d_matrices[:count], weights, need_weights),
        _wanted(column_sums, biases, need_biases),
        d_a.to(a.dtype) if need_a else None,
        _wanted(d_matrices[count:], bs, need_bs),
        None,
        None,
        None,
        None,
    )


def _wanted(
    grads: Sequence[Tensor], likes: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    layers = zip(grads, likes, needs, strict=True)
    return [grad.to(like.dtype) if needed else None for grad, like, needed in layers]


_call_gradients = DirectOp(lora_linear_bwd, _gradients)
_call_forward = DirectOp(lora_linear_fwd, _forward, (0, 1, 2, 3, 4), _setup_context, _backward)


def _forward_flops(
    x: torch.Size,
    weights: Sequence[torch.Size],
    biases: Any,
    a: torch.Size,
    bs: Sequence[torch.Size],
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * x[0] * (a[0] * a[1] + sum(n * k for n, k in (*weights, *bs)))


def _backward_flops(
    grads: Any,
    x: torch.Size,
    u: Any,
    weights: Any,
    a: torch.Size,
    bs: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    _, _, _, _, need_x, need_a, need_weights, need_bs = args
    rank_products = sum(n * r * (1 + need) for (n, r), need in zip(bs, need_bs, strict=True))
    weight_products = sum(
        n * k * (need_x + need) for (n, k), need in zip(weights, need_weights, strict=True)
    )
    return 2 * x[0] * (rank_products + weight_products + a[0] * a[1] * (need_x + need_a))


def _casts(x: Tensor, *matrices: Tensor) -> int:
    """Bytes of copies in x's dtype."""
    return sum(m.numel() * x.itemsize for m in matrices if m.dtype != x.dtype)


def _forward_workspace(
    x: Tensor, weights: list[Tensor], biases: Any, a: Tensor, bs: list[Tensor], *args: Any
) -> int:
    _, dropout_p, _, backend = args
    dropped = _dropout_bytes(x, dropout_p, backend)
    scaled = x.shape[0] * a.shape[0] * x.itemsize if backend in ("auto", "triton") else 0
    return dropped + scaled + _casts(x, a, *weights, *biases, *bs)


def _dropout_bytes(x: Tensor, p: float, backend: str) -> int:
    # the torch pass makes words of 64 bits and what leads to them
    return 0 if p == 0 else x.numel() * (2 * x.itemsize + (96 if backend == "torch" else 0))


def _backward_workspace(
    grads: list[Tensor], x: Tensor, u: Tensor, weights: list[Tensor], a: Tensor, bs: Any, *args: Any
) -> int:
    _, dropout_p, _, backend, *_ = args
    rank_products = u.numel() * u.itemsize * (4 if backend in ("auto", "triton") else 3)
    rank_products += sum(b.numel() * x.itemsize for b in bs)
    return rank_products + _dropout_bytes(x, dropout_p, backend) + _casts(x, a, *weights, *bs)


register_costs(lora_linear_fwd, flops=_forward_flops, workspace=_forward_workspace)
register_costs(lora_linear_bwd, flops=_backward_flops, workspace=_backward_workspace)


def lora_linears(
    x: Tensor,  # [..., K]
    layers: Sequence[LoraWeights],
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Several adapted layers of one input, which is read once by all their A's.

    Equals `[lora_linear(x, *layer, ...) for layer in layers]` with one dropout mask for all.
    Arguments, results and errors as in `lora_linear`; `layers` is not empty.
    """
    if not layers:
        raise ValueError("layers is empty; give at least one LoraWeights")
    for layer in layers:
        _check(x, layer)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    seed = check_dropout(dropout_p, seed)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    a = layers[0].a if len(layers) == 1 else torch.cat([layer.a for layer in layers])
    absent = x.new_empty(0)
    found = _call_forward(
        x if x.dim() == 2 else x.reshape(-1, x.shape[-1]),
        [layer.weight for layer in layers],
        [absent if layer.bias is None else layer.bias for layer in layers],
        a,
        [layer.b for layer in layers],
        [float(layer.scale) for layer in layers],
        float(dropout_p),
        seed,
        backend,
    )
    ys = list(found[:-1])
    # a view is one more node of autograd
    return ys if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def lora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    a: Tensor,  # [r, K]
    b: Tensor,  # [N, r]
    scale: float,
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`x W^T + bias + scale * (dropout(x) A^T) B^T`, [..., N].

    Args:
        x: [..., K], float32, bfloat16, float16 or float64. Under autocast it is cast first.
        weight, bias: the layer, as `nn.Linear` stores it. Usually frozen; gradients are computed
            where asked for. Cast to x's dtype if they have another.
        a, b, scale: the adapter, as PEFT stores it. They may be kept in a wider dtype than x: they
            are cast for the products, and their gradients returned in their own dtype.
        dropout_p: probability in [0, 1) of zeroing an element of the adapter's input.
        seed: of the dropout, an int64; needed with `dropout_p` > 0. One seed, one mask.
        backend: "auto" (GEMMs of the library unless `fastpost tune` measured otherwise,
            element-wise passes in Triton or C++), "triton" (one GEMM over K and r; also on CPUs
            under TRITON_INTERPRET=1), "cpp" or "torch" (which pass draws the dropout; the masks are
            equal).

    Returns:
        [..., N] in x's dtype. Keeps x and [M, r] for the backward.

    Raises:
        ValueError: shapes or devices that do not fit, a probability outside [0, 1), no seed, a
            backend that cannot run here.
        TypeError: dtypes that are not floating.
    """
    layer = LoraWeights(weight, bias, a, b, scale)
    return lora_linears(x, [layer], dropout_p=dropout_p, seed=seed, backend=backend)[0]


def _check(x: Tensor, layer: LoraWeights) -> None:
    weight, bias, a, b, _ = layer
    shapes = {"weight": weight, "a": a, "b": b}
    if x.dim() == 0 or any(matrix.dim() != 2 for matrix in shapes.values()):
        given = {name: tuple(matrix.shape) for name, matrix in ({"x": x} | shapes).items()}
        raise ValueError(f"expected x [..., K], weight [N, K], a [r, K], b [N, r], got {given}")
    (outputs, inputs), rank = weight.shape, a.shape[0]
    if x.shape[-1] != inputs or a.shape[1] != inputs or b.shape != (outputs, rank):
        raise ValueError(
            f"weight is [N={outputs}, K={inputs}]: expected x [..., {inputs}], a [r, {inputs}] and "
            f"b [{outputs}, {rank}], got {tuple(x.shape)}, {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"expected bias [{outputs}] or None, got {tuple(bias.shape)}")
    for name, tensor in ({"x": x, "bias": bias} | shapes).items():
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move one of them")
