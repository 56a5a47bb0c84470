"""The planner's tracer for stock TRL: what TRL does on a GPU, on tensors without memory.

Fake tensors live on the CPU, where TRL, bitsandbytes and PyTorch would take other paths. Here they
take those of a GPU:

    TRL's head                 scores the labelled positions alone; its Triton kernels allocate
                               nothing, its products accumulate in fp32 without fp32 copies
    scaled_dot_product_...     keeps q, k, v, output and one fp32 a row, as FlashAttention does;
                               without a mask only visible pairs are counted, with one all T x T are
                               (a kernel that is given a mask cannot leave any out)
    4-bit products             the weight in 16 bits lives while the product runs

What is left out (a mask's 16-bit copy, FlashAttention's fp32 gradient of q, its gradients of
repeated key heads) would count against TRL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.function import once_differentiable
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from fastpost.planning.ledger import KERNEL_WORKSPACE
from fastpost.planning.tracer import Tracer

__all__ = ["StockTracer"]

_aten = torch.ops.aten


class _NoKernel:
    """A Triton kernel that writes into what it is given: nothing to allocate, no products."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


class _Attention(torch.autograd.Function):
    """What a fused attention keeps and computes."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, products: int, tracer: Any
    ) -> Tensor:
        output = torch.empty_like(query)
        normaliser = torch.empty(query.shape[:3], dtype=torch.float32)
        tracer.flops["attention"] += 2 * products
        ctx.save_for_backward(query, key, value, output, normaliser)
        ctx.products, ctx.tracer = products, tracer
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.tracer.flops["attention"] += 5 * ctx.products
        return (*(torch.empty_like(t) for t in (query, key, value)), None, None)


class StockTracer(Tracer):
    """A tracer of TRL, PEFT and bitsandbytes as they are."""

    def __init__(self) -> None:
        super().__init__("triton")

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """As of its base, on the paths of a GPU."""
        with ExitStack() as stack:
            replaced = (
                (trl_utils, "_use_triton", lambda _: True),
                (chunked_logprob, "_use_triton", lambda _: True),
                (chunked_logprob, "_forward_kernel", _NoKernel()),
                (chunked_logprob, "_backward_kernel", _NoKernel()),
                (chunked_logprob, "_addmm_fp32", self._accumulate),
                (torch.nn.functional, "scaled_dot_product_attention", self._attend),
            )
            for module, name, value in replaced:
                stack.enter_context(mock.patch.object(module, name, value))
            stack.enter_context(super().tracing())
            yield

    def _accumulate(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        self.flops["aten::addmm"] += 2 * a.shape[0] * a.shape[1] * b.shape[1]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Any:
        batch, heads, length, width = query.shape
        pairs = length * (length + 1) // 2 if is_causal else length * key.shape[2]
        products = 2 * batch * heads * pairs * width
        return _Attention.apply(query, key, value, products, self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 0  # a metric, which nobody reads
        if func is _aten.masked_select.default and not isinstance(args[1], FakeTensor):
            chosen = self._positions(args[1].expand(args[0].shape).reshape(-1))[0]
            func, args = _aten.index_select.default, (args[0].reshape(-1), 0, chosen)
        elif func.overloadpacket in (
            _aten.index,
            _aten.index_put,
            _aten.index_put_,
            _aten._index_put_impl_,
        ):
            args = (args[0], self._integers(args[1]), *args[2:])
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            return self._four_bit(func, types, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _integers(self, indices: Any) -> list[Any]:
        """Masks as the positions they choose."""
        found: list[Any] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                found += self._positions(index)
            else:
                found.append(index)
        return found

    def _positions(self, mask: Tensor) -> list[Tensor]:
        """Of a mask without values, which only metrics have, all of them."""
        with unset_fake_temporarily():
            if isinstance(mask, FakeTensor):
                mask = torch.ones(mask.shape, dtype=torch.bool)
            return list(mask.nonzero(as_tuple=True))

    def _four_bit(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        rows, columns = args[2]
        size = rows * columns * args[0].itemsize
        account = self.ledger.open(size, KERNEL_WORKSPACE, self._now("bitsandbytes::gemm_4bit"))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.ledger.resize(account, 0, self._now("bitsandbytes::gemm_4bit"))
        self.flops["bitsandbytes::gemm_4bit"] += 2 * args[0].numel() * rows
        return result
