"""A copy of the policy in another dtype to sample from, brought up to date before each rollout.

Sampling is bound by reading the weights: in bf16 they are half as many bytes. Casting the trained
model itself would round its weights for good. The copy costs its own memory (2 bytes a parameter
in bf16), one pass over the weights a rollout, and adapters are merged into it, so that sampling
does not pay for them; the trained model is only read.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CastCopy:
    """Holds the copy, made at the first `refresh`.

    Args:
        dtype: "bfloat16", "float16" or "float32".

    Attributes:
        model: the copy, in evaluation mode, without gradients; None before the first `refresh`.

    Raises:
        ValueError: unknown dtype.
    """

    def __init__(self, dtype: str) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"rollout_dtype must be None or one of {list(_DTYPES)}, got '{dtype}'")
        self.model: Any = None
        self._dtype = _DTYPES[dtype]

    @torch.no_grad()
    def refresh(self, trained: nn.Module) -> Any:
        """The copy with the weights that `trained` has now.

        Raises:
            ValueError: the model cannot be copied so: quantised, or of a class that its
                configuration does not lead to.
        """
        base: Any = trained.get_base_model() if hasattr(trained, "get_base_model") else trained  # type: ignore[operator]
        if self.model is None:
            self.model = self._build(base)
        self._receive(_merged_weights(base, ""))
        return self.model

    def _receive(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        targets = self.model.state_dict()
        missing = set(targets)
        sources: dict[int, Tensor] = {}
        uses = Counter(target.data_ptr() for target in targets.values())
        for name, weight in weights:
            if name not in targets:
                continue
            target = targets[name]
            if uses[target.data_ptr()] > 1:
                source = sources.setdefault(target.data_ptr(), weight)
                if source is not weight:
                    raise ValueError(
                        f"'{name}' is tied to another weight in a rollout copy, but trained apart "
                        "from it; set rollout_dtype=None"
                    )
            target.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)
            missing.discard(name)
        if missing:
            raise ValueError(
                f"the rollout copy has weights that the trained model lacks: {sorted(missing)[:4]}"
                "; set rollout_dtype=None"
            )

    def _build(self, base: Any) -> Any:
        if getattr(base, "is_quantized", False):
            raise ValueError(
                "rollout_dtype makes a copy in that dtype, which a quantised model is too large "
                "for; set rollout_dtype=None to sample from the quantised model"
            )
        # The weights drawn here are overwritten; sampling must not notice that they were drawn.
        with torch.random.fork_rng(), torch.device(base.device):
            model: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(base.config),
                dtype=self._dtype,
                attn_implementation=base.config._attn_implementation,
            )
        # Sharding by FSDP2 puts a class of its own before the model's.
        own_class: Any = next(c for c in type(base).__mro__ if not issubclass(c, FSDPModule))
        if model.__class__ is not own_class:
            raise ValueError(
                f"the configuration of {own_class.__name__} leads to {type(model).__name__}; set "
                "rollout_dtype=None"
            )
        # Checkpointing turns the cache off in the configuration of the model it is enabled on.
        model.config.use_cache = True
        model.generation_config = copy.deepcopy(base.generation_config)
        return model.eval().requires_grad_(False)


def _merged_weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Names and weights the module has without adapters, the active ones merged in.

    One layer at a time: a merged copy of it lives until the next.
    """
    if isinstance(module, BaseTunerLayer):
        merged = copy.deepcopy(module)
        if not merged.merged:
            merged.merge()
        module = merged.get_base_layer()
    elif isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"{type(module).__name__} at '{prefix}' cannot be merged into a rollout copy; set "
            "rollout_dtype=None"
        )
    for name, tensor in itertools.chain(
        module.named_parameters(recurse=False), module.named_buffers(recurse=False)
    ):
        yield prefix + name, tensor
    for name, child in module.named_children():
        yield from _merged_weights(child, f"{prefix}{name}.")


__all__ = ["CastCopy"]
