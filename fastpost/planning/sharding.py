"""FSDP2 over a process group that moves nothing: this process is one of as many as are planned.

Units as accelerate and `fastpost.sharding` make them: each decoder layer, the embedding, the last
norm with the head (which stay gathered from forward to backward), the rest. A reference has its
layers and the rest. Weights are gathered in bf16, gradients reduced in fp32; frozen weights have no
gradient to reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastpost.planning.ledger import COMMUNICATION
from fastpost.planning.tracer import Tracer
from fastpost.sharding import decoder_layers, settle_gradients

__all__ = ["communication_named", "decoder_layers", "pretended_processes", "shard"]


@contextmanager
def pretended_processes(count: int) -> Iterator[None]:
    """A process group of `count`, of which this is the first; one process needs none.

    Raises:
        RuntimeError: a process group is there already, of a run that really is distributed.
    """
    if count == 1:
        yield
        return
    if dist.is_initialized():
        raise RuntimeError(
            "a process group is initialised already: plan in a process of its own, not in a run"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(
    model: Any,
    count: int,
    dtype: torch.dtype | None = torch.bfloat16,
    *,
    is_reference: bool = False,
) -> None:
    """Spread a model over `count` pretended processes, layer by layer; gathered in `dtype`."""
    with unset_fake_temporarily():
        mesh = init_device_mesh("cpu", (count,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

    def unit(modules: Any, **options: Any) -> None:
        fully_shard(modules, mesh=mesh, mp_policy=policy, **options)

    for layer in decoder_layers(model):
        unit(layer)
    if not is_reference:
        _shard_ends(model, unit)
    unit(model)
    settle_gradients(model)


def _shard_ends(model: Any, unit: Callable[..., None]) -> None:
    """Embedding and head, as `accelerate.utils.fsdp_utils.fsdp2_prepare_model` does it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and embedding.weight is head.weight
    if not is_tied:
        unit(embedding)
    inner = getattr(model, model.base_model_prefix, None)
    norms = [m for _, m in inner.named_children() if "Norm" in type(m).__name__] if inner else []
    tail = [*norms[-1:], *([embedding] if is_tied else []), head]
    tail = [module for module in tail if module is not None]
    if tail:
        unit(tail, reshard_after_forward=False)


@contextmanager
def communication_named(tracer: Tracer) -> Iterator[None]:
    """What FSDP2 allocates to gather and to reduce is named so; what DTensor makes only to learn
    shapes is left out."""

    def named(function: Any) -> Any:
        def within(*args: Any, **kwargs: Any) -> Any:
            with tracer.during("", COMMUNICATION):
                return function(*args, **kwargs)

        return within

    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(*args: Any, **kwargs: Any) -> Any:
        with tracer.paused():
            return propagate(*args, **kwargs)

    group = _fsdp_param_group
    names = ("foreach_all_gather", "foreach_all_gather_copy_out", "foreach_reduce")
    patches = [mock.patch.object(group, name, named(getattr(group, name))) for name in names]
    init = _fsdp_param.FSDPParam.init_all_gather_outputs
    patches.append(mock.patch.object(_fsdp_param.FSDPParam, "init_all_gather_outputs", named(init)))
    patches.append(mock.patch.object(ShardingPropagator, propagate.__name__, unseen))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
