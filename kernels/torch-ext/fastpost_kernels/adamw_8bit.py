"""AdamW with 8-bit states: one fused step of many tensors, in place.

    m <- b1 m + (1 - b1) s g,   v <- b2 v + (1 - b2) (s g)^2
    w <- (1 - lr decay) w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

Strategy. Every element is read, updated in fp32 and written back once, by one launch over a list
of tensors that finds its addresses in a table: no launch a tensor, no compilation a shape. m and v
are a byte each in blocks of 256 with one fp32 absmax (`_dynamic_map.py`): the dynamic maps of
bitsandbytes, because their levels are known to converge and its states can be read byte for byte.
Weights in bf16 are rounded up or down at random, up with the probability of what is cut off: to
nearest, a step below 2^-9 of its weight is lost each time, at random it is kept on average. The
random words are a function of (seed, step, stream, element) alone (`_philox.py`), so that a resumed
run rounds as the undisturbed one. Rejected: an fp32 copy of the weights, which costs 4 bytes a
parameter for what stochastic rounding gives; a linear map, in which small moments are 0.

Bytes a parameter: 2 weight + 2 gradient + 2 states + 8/256 absmax = 6.03 held in bf16, where fp32
weights with fp32 states and gradients hold 16; 10.06 moved: weight and states read and written,
gradient read. Small tensors (the caller's choice) have states in fp32.

Sources: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv:1711.05101),
algorithm 2; Dettmers et al. (arXiv:2110.02861), section 2; for the rounding Gupta et al., "Deep
learning with limited numerical precision" (arXiv:1502.02551), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _adamw_8bit_passes as passes
from ._adamw_8bit_tables import Lists, Rule
from ._cost import register_costs
from ._device import BACKENDS, resolve_backend
from ._dynamic_map import SIGNED_ZERO, num_blocks
from ._namespace import add_op_namespace_prefix

__all__ = ["AdamWState", "adamw_8bit_", "adamw_state"]

_DTYPES = (torch.float32, torch.bfloat16)


class AdamWState(NamedTuple):
    """Both moments of a tensor, in its order of memory: a byte an element, or float32.

    Attributes:
        exp_avg: m as indices of the signed map, uint8; or float32.
        exp_avg_sq: v as indices of the unsigned map, uint8; or float32.
        absmax: [ceil(elements / 256)] float32, of the blocks of m; [0] beside float32 moments.
        absmax_sq: the same of v.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    absmax: Tensor
    absmax_sq: Tensor


def adamw_state(param: Tensor, *, is_8bit: bool = True) -> AdamWState:
    """Moments of 0 in the shape of `param`, in 8 bits or float32."""
    blocks = num_blocks(param.numel()) if is_8bit else 0
    dtype = torch.uint8 if is_8bit else torch.float32
    shape, device = param.shape, param.device
    return AdamWState(
        torch.full(shape, SIGNED_ZERO if is_8bit else 0, dtype=dtype, device=device),
        torch.zeros(shape, dtype=dtype, device=device),
        torch.zeros(blocks, dtype=torch.float32, device=device),
        torch.zeros(blocks, dtype=torch.float32, device=device),
    )


@torch.library.custom_op(
    add_op_namespace_prefix("adamw_8bit_"),
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "absmaxes", "absmax_sqs"),
)
def adamw_8bit_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    absmaxes: Sequence[Tensor],
    absmax_sqs: Sequence[Tensor],
    grad_scale: Tensor | None,
    streams: Sequence[int],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
    backend: str,
) -> None:
    """One launch: one step, weights of one dtype, gradients too, moments too. Seed -1 is none."""
    lists = Lists(params, grads, exp_avgs, exp_avg_sqs, absmaxes, absmax_sqs)
    given_seed = None if seed < 0 else seed
    rule = Rule(step, lr, beta1, beta2, eps, weight_decay, grad_scale, given_seed)
    passes.update(lists, rule, streams, backend)


@adamw_8bit_op.register_fake
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    absmaxes: Sequence[Tensor],
    absmax_sqs: Sequence[Tensor],
    grad_scale: Tensor | None,
    streams: Sequence[int],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
    backend: str,
) -> None:
    return None


def _no_flops(*args: object, **kwargs: object) -> int:
    return 0  # torch's counter counts multiplications of matrices only


def _workspace(params: Sequence[Tensor], *args: object) -> int:
    sizes = [param.numel() for param in params]
    return passes.workspace(sizes, str(args[-1]))


register_costs(adamw_8bit_op, flops=_no_flops, workspace=_workspace)


@torch.no_grad()
def adamw_8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[AdamWState],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    steps: Sequence[int],
    grad_scale: Tensor | float | None = None,
    seed: int | None = None,
    streams: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """One step of AdamW on every tensor, weights and moments in place.

    With moments in float32, fp32 weights and no seed it equals `torch.optim.AdamW`.

    Args:
        params: weights, float32 or bfloat16, contiguous, of any shapes, on one device.
        grads: of the same shapes, float32 or bfloat16.
        states: of `adamw_state`, changed in place.
        lr, betas, eps, weight_decay: AdamW's; the decay is decoupled, per step lr * weight_decay.
        steps: number of each tensor's step, from 1: the bias corrections'.
        grad_scale: every gradient is multiplied by it: a number, or one float32 on the device,
            read there without waiting for it (clipping: min(1, limit / norm)).
        seed: of 32 bits. bfloat16 weights are rounded at random; None rounds to nearest.
        streams: what tells the random words of one tensor from another's, its index by default.
        backend: "triton", "cpp" (CPUs), "torch", or "auto": the first of them that can run.

    Raises:
        TypeError: other dtypes.
        ValueError: lists of different lengths, shapes or devices that differ, weights that are not
            contiguous, numbers out of their range, a backend that cannot run.
    """
    _check_numbers(lr, betas, eps, weight_decay, seed, backend)
    streams = range(len(params)) if streams is None else streams
    lengths = [len(x) for x in (params, grads, states, steps, streams)]
    if len(set(lengths)) > 1:
        raise ValueError(f"params, grads, states, steps and streams must be as many, got {lengths}")
    if not params:
        return
    for param, grad, state, step in zip(params, grads, states, steps, strict=True):
        _check_tensor(param, grad, state, step, params[0].device)
    if grad_scale is not None:
        grad_scale = torch.as_tensor(grad_scale, dtype=torch.float32, device=params[0].device)
        if grad_scale.numel() != 1:
            raise ValueError(f"grad_scale must be one number, got {tuple(grad_scale.shape)}")
    launches: dict[tuple[object, ...], list[int]] = {}
    for index, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
        kind = (param.dtype, grad.dtype, state.exp_avg.dtype, steps[index])
        launches.setdefault(kind, []).append(index)
    for chosen in launches.values():
        adamw_8bit_op(
            [params[i] for i in chosen],
            [grads[i].contiguous() for i in chosen],
            *map(list, zip(*(states[i] for i in chosen), strict=True)),
            grad_scale,
            [streams[i] for i in chosen],
            steps[chosen[0]],
            lr,
            *betas,
            eps,
            weight_decay,
            -1 if seed is None else seed,
            resolve_backend(backend, params[0].device, torch.float32),
        )


def _check_numbers(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int | None,
    backend: str,
) -> None:
    if not (lr >= 0 and eps >= 0 and weight_decay >= 0):
        raise ValueError(
            f"lr, eps and weight_decay must not be negative, got {lr}, {eps} and {weight_decay}"
        )
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _check_tensor(
    param: Tensor, grad: Tensor, state: AdamWState, step: int, device: torch.device
) -> None:
    if param.dtype not in _DTYPES or grad.dtype not in _DTYPES:
        raise TypeError(
            "weights and gradients must be float32 or bfloat16, got "
            f"{param.dtype} and {grad.dtype}; cast them"
        )
    if grad.is_sparse:
        raise TypeError("gradients must be dense, got a sparse one; call grad.to_dense()")
    if grad.shape != param.shape:
        raise ValueError(f"gradient {tuple(grad.shape)} of a weight {tuple(param.shape)}")
    if not param.is_contiguous():
        raise ValueError(
            f"weights must be contiguous, got strides {param.stride()} of {tuple(param.shape)}"
        )
    is_8bit = state.exp_avg.dtype == torch.uint8
    dtype = torch.uint8 if is_8bit else torch.float32
    blocks = num_blocks(param.numel()) if is_8bit else 0
    sizes = [param.numel()] * 2 + [blocks] * 2
    dtypes = [dtype] * 2 + [torch.float32] * 2
    if [x.numel() for x in state] != sizes or [x.dtype for x in state] != dtypes:
        raise ValueError(
            f"the state of a weight {tuple(param.shape)} holds {sizes} elements of {dtypes}, got "
            f"{[x.numel() for x in state]} of {[x.dtype for x in state]}; make it by adamw_state"
        )
    if any(not x.is_contiguous() for x in state):
        raise ValueError("the tensors of a state must be contiguous")
    if any(x.device != device for x in (param, grad, *state)):
        raise ValueError(f"weights, gradients and states must all be on one device, here {device}")
    if step < 1:
        raise ValueError(f"steps are counted from 1, got {step}")
