"""Calls an op and its gradient as one node of autograd, without torch.library's layers.

An op of torch.library can be traced, watched and compiled, for which every call goes through the
dispatcher and generated Python: some 0.2 ms a layer, forward and backward, while the products of a
layer with a few hundred rows take 1 to 10 ms on one core. In plain eager execution nobody asks for
any of it: there the op's own function runs below one `torch.autograd.Function`. Wherever someone
does ask (torch.compile, a dispatch mode such as FLOP counters or fake tensors, functorch, tensors
of a subclass), the op is called. Both run the same functions; a second derivative is refused by
both.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["DirectOp", "is_watched"]

# Tensors without operators of their own, and what most other arguments are.
_PLAIN = frozenset({Tensor, nn.Parameter, type(None), int, float, bool, str})


class DirectOp:
    """An op that is called as its function where nothing watches it.

    Args:
        op: of `torch.library.custom_op`; its gradient is registered here.
        function: what the op runs.
        differentiable: places of the arguments that may have gradients, tensors or lists of them;
            none for an op without a gradient.
        setup_context, backward: as `op.register_autograd` takes them. `backward` may be given None
            for an output that nothing used.
    """

    def __init__(
        self,
        op: Any,
        function: Callable[..., Any],
        differentiable: tuple[int, ...] = (),
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.op, self.function, self.differentiable = op, function, differentiable
        self.setup_context, self.backward = setup_context, backward
        if backward is not None:
            op.register_autograd(backward, setup_context=setup_context)

    def __call__(self, *args: Any) -> Any:
        if is_watched(args):
            return self.op(*args)
        if self.backward is None or not torch.is_grad_enabled():
            return self.function(*args)
        flat: list[Tensor | None] = []
        for place in self.differentiable:
            given = args[place]
            flat += given if isinstance(given, list) else (given,)
        return _Node.apply(self, args, *flat)


def is_watched(args: tuple[Any, ...]) -> bool:
    """Whether something traces or counts operators now, or a tensor has operators of its own."""
    if (
        torch.compiler.is_compiling()  # first: a compiler cannot trace the others
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    for arg in args:
        if type(arg) is list:
            if is_watched(tuple(arg)):
                return True
        elif type(arg) not in _PLAIN and isinstance(arg, Tensor):
            return True
    return False


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: DirectOp, args: tuple[Any, ...], *flat: Tensor | None) -> Any:
        assert call.setup_context is not None
        output = call.function(*args)
        needs: list[Any] = [False] * len(args)
        start = 2
        for place in call.differentiable:
            count = len(args[place]) if isinstance(args[place], list) else 0
            end = start + max(count, 1)
            part = ctx.needs_input_grad[start:end]
            needs[place], start = part if count else part[0], end
        context = SimpleNamespace(needs_input_grad=needs, save_for_backward=ctx.save_for_backward)
        call.setup_context(context, args, output)
        del context.save_for_backward  # it holds ctx, which holds the context
        ctx.call, ctx.context, ctx.gives_list = call, context, isinstance(output, list)
        ctx.set_materialize_grads(False)
        return tuple(output) if ctx.gives_list else output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # someone may differentiate once more
            return once_differentiable(_Node._gradients)(ctx, *grads)
        return _Node._gradients(ctx, *grads)

    @staticmethod
    def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        context = SimpleNamespace(saved_tensors=ctx.saved_tensors, **vars(ctx.context))
        found = ctx.call.backward(context, *((list(grads),) if ctx.gives_list else grads))
        flat: list[Tensor | None] = [None, None]
        for place in ctx.call.differentiable:
            part = found[place]
            flat += part if isinstance(part, list) else (part,)
        return tuple(flat)
