"""FSDP2 as accelerate and TRL set it up, corrected where that costs accuracy or memory.

- accelerate's half-precision policy casts what the model returns, so log-probs would be rounded to
  bf16 before a loss sees them, and sums gradients of the processes in bf16. Here weights are
  gathered in half precision, outputs keep the precision they were computed in, and gradients are
  reduced in fp32.
- TRL makes the whole reference model one unit: every process gathers all of it at once, or, where
  transformers spread the policy, each holds all of it. Here each decoder layer is a unit, as in
  the policy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

__all__ = [
    "check_sharding",
    "decoder_layers",
    "keep_precision",
    "reshard",
    "settle_gradients",
    "shard_reference",
]


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated blocks of a transformers model, PEFT's wrapper or not.

    Raises:
        ValueError: the model has no list of layers.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(base.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(base).__name__} has no list of decoder layers to shard")
    return list(layers)


def keep_precision(accelerator: Accelerator) -> None:
    """Let FSDP2 round neither outputs nor sums of gradients; nothing to do without FSDP.

    Raises:
        ValueError: FSDP's first version was asked for.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version is {plugin.fsdp_version}; fastpost reads single weights, which FSDP 1 "
            "flattens away. Give fsdp_config={'version': 2}"
        )
    # Without mixed precision there is no policy, and bf16 weights would sum gradients in bf16.
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 leaves gathered after a forward (the head), so that parameters are shards.

    An optimizer made, or a fingerprint taken, before that would hold the copy instead.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_reference(reference: Any, policy: Any) -> None:
    """Spread a reference model over the processes by layer, if the policy is or will be.

    Under accelerate the rest (embedding, last norm, head) is left to TRL, which makes it the root
    unit; beside a policy that transformers spread at loading the root is made here.

    Args:
        reference: a transformers model that nothing has wrapped yet.
        policy: the model in training.
    """
    if isinstance(reference, FSDPModule):
        return
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
    spread = next((p for p in policy.parameters() if isinstance(p, DTensor)), None)
    options: dict[str, Any]
    if plugin is not None:
        mesh = getattr(AcceleratorState(), "device_mesh", None)
        if mesh is not None:
            mesh = mesh[tuple(AcceleratorState().parallelism_config.fsdp_dim_names)]
        options = {
            "mesh": mesh,
            "mp_policy": plugin.mixed_precision_policy,
            "reshard_after_forward": plugin.reshard_after_forward,
            "offload_policy": plugin.cpu_offload,
        }
    elif spread is not None:
        options = {"mesh": spread.device_mesh}
    else:
        return
    for layer in decoder_layers(reference):
        if not isinstance(layer, FSDPModule):
            fully_shard(layer, **options)
    if plugin is None:
        fully_shard(reference, **options)


def check_sharding(trainer: Any) -> None:
    """Refuse what would train something else than was asked for, without a word.

    Raises:
        ValueError: `fsdp` on processors, where accelerate does not shard; or transformers spread a
            model whose head is its embedding, and both are trained.
    """
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"fsdp was asked for, but accelerate runs as {trainer.accelerator.distributed_type} "
            "and would hold a whole model in every process. It shards on accelerators only; on "
            "CPUs load the model with from_pretrained(..., distributed_config=DistributedConfig("
            "fsdp_size=...)) instead"
        )
    model = trainer.model
    if not getattr(trainer, "is_distributed_loading_by_transformers", False):
        return
    # transformers 5.24 ties them after it has spread them: the head keeps a copy of its own, which
    # no optimizer sees.
    embedding = model.get_input_embeddings()
    if model.config.get_text_config().tie_word_embeddings and embedding.weight.requires_grad:
        raise ValueError(
            f"{type(model).__name__} ties its head to its embedding, and transformers' "
            "distributed_config would train the embedding alone. Give fsdp=True in the trainer's "
            "configuration instead, or train an adapter"
        )


def settle_gradients(model: Any) -> None:
    """Let FSDP2 see now which parameters are trained; nothing to do for a model it does not shard.

    Its units settle at their first forward how gradients are summed. Where that is the reference
    pass, with the adapter off, nothing is trained, and gradients would later come in half precision
    to weights in fp32.

    Args:
        model: as it is trained, before its first forward.
    """
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()
