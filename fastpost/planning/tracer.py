"""Runs a program on tensors without memory and writes down what it would allocate and compute.

    real tensors (ids, masks, the plan of a pack)   run as ever: the engine reads their values
    everything that meets a fake tensor             runs as shapes, in PyTorch's FakeTensorMode

Storages made by an operator are accounts of a `Ledger`, closed when Python drops them. Operators of
`fastpost_kernels` are opaque to PyTorch's counters: their registered workspace is alive while they
run, and their registered formula gives their FLOPs. Fake tensors live on the CPU, since a build of
torch without CUDA has no others; for a plan of a GPU the formulas are asked about its backend.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from fastpost import adapted_layers, layers, offloaded_states, pooling
from fastpost.planning.kept_logits import kept_logits_bytes
from fastpost.planning.ledger import (
    ACTIVATIONS,
    HEAD_WORKSPACE,
    HOST,
    KERNEL_WORKSPACE,
    OPTIMIZER,
    Ledger,
    Moment,
)
from fastpost_kernels import workspace_bytes
from fastpost_kernels._device import resolve_backend
from fastpost_kernels._nf4_format import nested_levels
from fastpost_kernels._prefix_native import can_run_native
from fastpost_kernels._prefix_segments import schedule_of
from fastpost_kernels.linear_cross_entropy import linear_cross_entropy_fwd
from fastpost_kernels.prefix_attention import _prefix_attention_bwd, _prefix_attention_fwd

__all__ = ["Tracer"]

_ATTENTION_OPS = {
    op._opoverload.overloadpacket: op for op in (_prefix_attention_fwd, _prefix_attention_bwd)
}
_CROSS_ENTROPY = linear_cross_entropy_fwd._opoverload.overloadpacket
_HEAD_OPS = ("linear_cross_entropy", "logprob", "preference_logratio")


class Tracer(TorchDispatchMode):
    """Within `tracing()`, tensors have no memory and every storage is written down.

    Args:
        backend: of the kernels whose workspace is counted; None takes the one that was chosen for
            the CPU.

    Attributes:
        ledger: who holds how many bytes.
        flops: operator -> floating-point operations so far.
        region: of the model, set by whoever knows it; peaks are kept apart by it.
        collectives: collective -> bytes of the whole tensors it moved so far.
    """

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.flops: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.backend = backend
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._accounts: dict[int, tuple[int, Any]] = {}
        self._phase, self._category = "setup", ACTIVATIONS
        self.region = ""
        self._is_paused = False
        self._kept: int | None = None

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Enter both modes and follow storages that are resized, as FSDP2's are."""
        resize = torch.UntypedStorage.resize_

        def followed(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            known = self._accounts.get(storage._cdata)
            if known is not None:
                self.ledger.resize(known[0], storage.nbytes(), self._now())
            return result

        nested_levels()  # kept for good at its first call: it has to be real
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", followed))
            # The engine tells plain tensors by their class.
            for module in (adapted_layers, layers, offloaded_states):
                stack.enter_context(mock.patch.object(module, "type", _plain_type, create=True))
            places = mock.patch.object(pooling, "pooled_places", _really(pooling.pooled_places))
            stack.enter_context(places)
            # The mode refers to fake parameters weakly, which forbids `module.to(dtype)`.
            no_references = SimpleNamespace(getweakrefs=lambda _: ())
            stack.enter_context(mock.patch.object(torch.utils, "weakref", no_references))
            stack.enter_context(self._fakes)
            stack.enter_context(self)
            yield

    @contextmanager
    def during(self, phase: str, category: str = ACTIVATIONS) -> Iterator[None]:
        """Storages made within are of `category` until `name` says otherwise."""
        before = self._phase, self._category, self.region
        self._phase, self._category = phase or self._phase, category
        try:
            yield
        finally:
            self._phase, self._category = before[:2]
            if phase:
                self.region = before[2]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is written down: for shapes that are worked out, not computed."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def name(self, tensor: Tensor, category: str) -> None:
        """Says what the storage of a tensor is (of a DTensor: this process's shard)."""
        local: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if isinstance(local, FakeTensor):
            self.ledger.name(self._account(local), category)

    def _now(self, operator: str = "") -> Moment:
        return Moment(self._phase, self.region, operator)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it turns into operators on shards, which come here
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if given and not any(isinstance(t, FakeTensor) for t in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # the tensor itself, of which fake tensors would make a second one
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].dtype == torch.bool:
                return False  # only ever whether something went wrong with the values
            if self._category == OPTIMIZER:
                return 1.0  # the number of the step
        if self.backend is None and func.overloadpacket in _ATTENTION_OPS:
            return self._attention(func, args)
        result = func(*args, **kwargs)
        if self._is_paused:
            return result
        moment = self._now(f"{func.namespace}::{func.overloadpacket.__name__}")
        for tensor in tree_iter(result):
            if isinstance(tensor, FakeTensor):
                self._account(tensor, moment)
        with unset_fake_temporarily():  # formulas may read real arguments
            self._count(func, args, kwargs, result, moment)
        return result

    def _attention(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Attention on the CPU: PyTorch's operators inside are followed, where the workspace's
        formula is a bound for the worst segments. The C++ kernel has no workspace of tensors."""
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False))
        flops = Counter(self.flops)
        with unset_fake_temporarily():
            schedule = schedule_of(given["segments"], given["query"].shape[1])
        if can_run_native(given["query"], schedule, given["window"], given["softcap"]):
            result = func(*args)
            for tensor in result:
                self._account(tensor)
        else:
            with self:
                result = _ATTENTION_OPS[func.overloadpacket]._init_fn(*args)
        self.flops = flops
        with unset_fake_temporarily():
            name = f"{func.namespace}::{func.overloadpacket.__name__}"
            self.flops[name] += int(flop_registry[func.overloadpacket](*args, out_val=result))
        return result

    def _account(self, tensor: Tensor, moment: Moment | None = None) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._accounts.get(key)
        if known is not None:
            return known[0]
        size = storage.nbytes()
        if self._category == HOST:  # PyTorch's allocator of pinned memory rounds up
            size = 1 << (size - 1).bit_length()
        account = self.ledger.open(size, self._category, moment or self._now())

        def close(_: Any) -> None:
            self._accounts.pop(key, None)
            self.ledger.resize(account, 0, self._now())

        self._accounts[key] = account, weakref.ref(storage, close)
        return account

    def _count(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, moment: Moment
    ) -> None:
        packet = func.overloadpacket
        formula = flop_registry.get(packet)
        name = f"{func.namespace}::{packet.__name__}"
        if formula is not None:
            self.flops[name] += int(formula(*args, **kwargs, out_val=result))
        elif packet is torch.ops.aten._grouped_mm:  # PyTorch has no formula for it
            self.flops[name] += _grouped_flops(*args[:2])
        if func.namespace == "c10d":
            self.collectives[packet.__name__] += _moved_bytes(packet.__name__, args)
        if not func.namespace.startswith("fastpost"):
            return
        try:
            size = workspace_bytes(func, *self._with_backend(func, args), **kwargs)
        except KeyError:
            return
        if self.backend is None and packet is _CROSS_ENTROPY:
            self._keep_logits(args, size, moment)
            return
        is_head = any(part in packet.__name__ for part in _HEAD_OPS)
        account = self.ledger.open(size, HEAD_WORKSPACE if is_head else KERNEL_WORKSPACE, moment)
        self.ledger.resize(account, 0, moment)

    def _keep_logits(self, args: tuple[Any, ...], size: int, moment: Moment) -> None:
        """On a CPU a part of the head's workspace stays, and is the next call's."""
        if self._kept is None:
            self._kept = self.ledger.open(0, HEAD_WORKSPACE, moment)
        self.ledger.resize(self._kept, size, moment)
        self.ledger.resize(self._kept, kept_logits_bytes(args), moment)

    def _with_backend(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as they are on the planned device; a CPU's "auto" as what it stands for."""
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False))
        backend = self.backend
        if backend is None and given.get("backend") == "auto":
            backend = resolve_backend("auto", torch.device("cpu"), torch.float32)
        if backend is None or "backend" not in given:
            return args
        return tuple((given | {"backend": backend}).values())


def _really(function: Any) -> Any:
    """Of real tensors only: what it makes beside them is real too."""

    def run(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return run


def _plain_type(thing: Any) -> Any:
    """The class of anything, of a fake tensor the one it stands for."""
    return Tensor if isinstance(thing, FakeTensor) else type(thing)


def _grouped_flops(a: Tensor, b: Tensor) -> int:
    """Of products of groups: rows of `a` are spread over the groups, or each group has its own."""
    groups = len(a) if a.dim() == b.dim() == 3 else 1
    return 2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _moved_bytes(name: str, args: tuple[Any, ...]) -> int:
    """Bytes of the whole (gathered, or before it is scattered) tensors of a collective."""
    tensors = [t for t in tree_iter(args) if isinstance(t, Tensor)]
    return max((t.numel() * t.itemsize for t in tensors), default=0)
