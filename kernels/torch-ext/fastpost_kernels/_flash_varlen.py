"""FlashAttention's kernels for sequences that lie one after another, where flash-attn is installed.

`VarlenKernel` is all that prefix_attention asks of such a package: a forward that returns the
log-sum-exp, and a backward that takes `out` and the log-sum-exp as arguments. Given those of a
softmax over more keys than the call sees, the backward returns exactly the call's share of that
softmax's gradients. flash-attn's public functions keep both to themselves, so `FlashAttention2`
calls the two functions below them, as releases 2.8 declare them (sources of 2.8.0 to 2.8.4:
flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp). Other releases are refused;
FlashAttention 3 is another package with other functions, and has no stable release.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["FlashAttention2", "Layout", "VarlenKernel", "unavailable_reason", "varlen_kernel"]

_SUPPORTED = (2, 8)
_MAX_HEAD_SIZE = 256


class Layout(NamedTuple):
    """B sequences. Query i of one sees its keys from i − left to i + right; None is unbounded.

    A sequence with a bound has as many keys as queries. None is empty.
    """

    cu_queries: Tensor  # [B + 1] int32, the first query of each sequence, and the end
    cu_keys: Tensor  # [B + 1] int32
    max_queries: int
    max_keys: int
    left: int | None
    right: int | None


class VarlenKernel(Protocol):
    """Attention of sequences laid end to end; head sizes are equal and a multiple of 8."""

    def forward(
        self,
        query: Tensor,  # [Tq, Hq, D]
        key: Tensor,  # [Tk, Hk, D]
        value: Tensor,  # [Tk, Hk, D]
        layout: Layout,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (out [Tq, Hq, D] in the dtype of query, lse [Hq, Tq] in fp32)."""
        ...

    def backward(
        self,
        grad_out: Tensor,  # [Tq, Hq, D]
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,  # [Tq, Hq, D]
        lse: Tensor,  # [Hq, Tq]
        layout: Layout,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (dQ, dK, dV): the same bits for the same arguments."""
        ...


class FlashAttention2:
    """flash-attn 2.8 as a `VarlenKernel`."""

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self._forward, self._backward = forward, backward

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(
            q=query, k=key, v=value, **_options(layout, scale, softcap), return_softmax=False
        )
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: Layout,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
        self._backward(
            dout=grad_out, q=query, k=key, v=value, out=out, softmax_lse=lse,
            dq=grads[0], dk=grads[1], dv=grads[2], deterministic=True,
            **_options(layout, scale, softcap),
        )  # fmt: skip
        return grads[0], grads[1], grads[2]


def _options(layout: Layout, scale: float, softcap: float | None) -> dict[str, Any]:
    """What flash-attn's forward and backward share; −1 is no window, 0 no softcap."""
    return {
        "cu_seqlens_q": layout.cu_queries,
        "cu_seqlens_k": layout.cu_keys,
        # An upper bound is all they need. At 1 the forward takes its way for decoding instead.
        "max_seqlen_q": max(2, layout.max_queries),
        "max_seqlen_k": layout.max_keys,
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": layout.right == 0,
        "window_size_left": -1 if layout.left is None else layout.left,
        "window_size_right": -1 if layout.right is None else layout.right,
        "softcap": softcap or 0.0,
        "alibi_slopes": None,
    }


def unavailable_reason(query: Tensor, head_size: int) -> str | None:
    """Why flash-attn cannot serve a call, after the words "backend 'flash'"; None if it can."""
    wanted = ".".join(map(str, _SUPPORTED))
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return f"needs the package flash-attn {wanted}, which is not installed"
    if version.split(".")[:2] != [str(number) for number in _SUPPORTED]:
        return f"calls functions of flash-attn {wanted} by name, found {version}"
    if query.device.type != "cuda" or torch.version.hip is not None:
        return f"needs tensors on an NVIDIA GPU, got {query.device}"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, got {query.dtype}"
    if head_size > _MAX_HEAD_SIZE:
        return f"takes heads of at most {_MAX_HEAD_SIZE}, got {head_size}"
    return None


@functools.cache
def varlen_kernel() -> VarlenKernel:
    """The installed package's kernels; ask `unavailable_reason` first."""
    package = importlib.import_module("flash_attn.flash_attn_interface")
    return FlashAttention2(package._flash_attn_varlen_forward, package._flash_attn_varlen_backward)
