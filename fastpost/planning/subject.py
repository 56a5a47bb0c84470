"""The model of a plan, made and wrapped as a trainer wraps it, where tensors have no memory.

configuration ─► model ─► 4-bit weights ─► adapter ─► engine ─► checkpointing ─► FSDP2
"""

from __future__ import annotations

import types
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fastpost import adapted_layers, layers
from fastpost.adapters.nf4_layer import Nf4Linear
from fastpost.checkpointed_layers import keep_layer_options
from fastpost.head import Head
from fastpost.planning.ledger import BUFFERS, PARAMETERS
from fastpost.planning.models import make_model
from fastpost.planning.request import Request
from fastpost.planning.sharding import shard
from fastpost.planning.tracer import Tracer
from fastpost.pooling import PooledEngine
from fastpost.scoring import Engine
from fastpost.tiled_mlp import tile
from fastpost_kernels import Nf4Weight

__all__ = ["TracedEngine", "make_policy", "make_reference"]

_BLOCK, _NESTED_BLOCK = 64, 256
_GPU_BUDGET = 512 << 20  # what the kernels of the head take on a GPU unless told otherwise


# Fields of `ScoredOutput` that the trainers ask for beside log-probs.
_OUTPUTS = {
    "sft": ("entropy", "is_top1"),
    "dpo": ("entropy", "mean_logits", "is_top1"),
    "kto": ("entropy", "mean_logits"),
    "grpo": ("entropy",),
    "rloo": ("entropy",),
}
_REFERENCE_FREE = ("mean_logits",)


class TracedEngine(Engine):
    """The engine on a model whose weights have no values to check it with."""

    def _run_self_check(self) -> str:
        return "not run, the weights have no values"


class _TracedPooledEngine(PooledEngine):
    """The same of reward models."""

    def _run_self_check(self) -> str:
        return "not run, the weights have no values"


def make_policy(request: Request, config: Any, tracer: Tracer, on_gpu: bool = True) -> Any:
    """The trained model, ready for its steps. Call it within `tracer.tracing()`.

    Returns:
        (the model to call, its engine)
    """
    adapter, is_reward = request.adapter, request.method == "reward"
    model: Any = make_model(config, _weight_dtype(request), is_reward=is_reward)
    if adapter is not None and adapter.kind == "qlora":
        _quantize(model, torch.bfloat16 if request.num_gpus > 1 else torch.uint8)
    if adapter is not None:
        model = get_peft_model(
            model,
            LoraConfig(
                r=adapter.rank,
                lora_alpha=2 * adapter.rank,
                target_modules="all-linear",
                use_dora=adapter.kind == "dora",
                task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
            ),
        )
        if request.checkpointing:
            model.enable_input_require_grads()
    engine = _install(request, model, on_gpu, _OUTPUTS.get(request.method, _REFERENCE_FREE))
    if request.checkpointing:
        options = {"use_reentrant": False} | ({"offload": True} if request.offload else {})
        keep_layer_options(model, options)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    _spread(request, model)
    model.train()
    _name_tensors(model, tracer, PARAMETERS)
    return model, engine


def make_reference(
    request: Request, config: Any, tracer: Tracer, category: str, on_gpu: bool = True
) -> Any:
    """A frozen second model, in the dtype of the policy: (the model to call, its engine)."""
    model: Any = make_model(config, _weight_dtype(request))
    model.requires_grad_(False)
    engine = _install(request, model, on_gpu, ())
    _spread(request, model, is_reference=True)
    model.eval()
    _name_tensors(model, tracer, category)
    return model, engine


def _spread(request: Request, model: Any, *, is_reference: bool = False) -> None:
    """What accelerate's `prepare` does: FSDP2, whose policy casts weights, or autocast."""
    if request.num_gpus > 1:
        dtype = None if request.precision == "fp32" else torch.bfloat16
        shard(model, request.num_gpus, dtype, is_reference=is_reference)
    elif request.precision == "mixed":
        autocast = torch.autocast("cpu", torch.bfloat16)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))


def _weight_dtype(request: Request) -> torch.dtype:
    """Frozen weights beside an adapter are bf16; all others too, unless precision is mixed. In
    fp32 there are no others."""
    return torch.float32 if request.has_wide_weights else torch.bfloat16


def _install(request: Request, model: Any, on_gpu: bool, outputs: tuple[str, ...]) -> Any:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    budget = None
    if request.memory_budget_gb is not None:
        budget = int(request.memory_budget_gb * 2**30)
    elif on_gpu:
        budget = _GPU_BUDGET
    engine: Any
    if request.method == "reward":
        engine = _TracedPooledEngine(base, True)
    else:
        engine = TracedEngine(base, Head.of(base, memory_budget=budget), True, outputs)
    if on_gpu:
        _without_cpu_layers(base)
    if request.mlp_tile_tokens is not None:
        tile(base, request.mlp_tile_tokens)
    return engine


def _without_cpu_layers(model: nn.Module) -> None:
    """Leave the fused forwards that a GPU has: those of adapted layers."""
    layers.detach(model)
    for module in model.modules():
        forward = adapted_layers.forward_for(module)
        if forward is not None:
            module.__dict__["forward"] = types.MethodType(forward, module)


def _quantize(model: nn.Module, storage: torch.dtype) -> None:
    """Put 4-bit layers in place of the linear ones, the head apart, as `load_nf4` does."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.endswith("lm_head"):
            continue
        parent, _, child = name.rpartition(".")
        layer = Nf4Linear(
            _nf4(module.weight, storage), module.bias, compute_dtype=module.weight.dtype
        )
        setattr(model.get_submodule(parent), child, layer)


def _nf4(weight: Tensor, storage: torch.dtype) -> Nf4Weight:
    """Tensors of the sizes that `nf4_quantize` with double quantisation gives."""
    rows, columns = weight.shape
    packed = (weight.numel() // 2 // storage.itemsize, 1)
    blocks = -(-weight.numel() // _BLOCK)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    return Nf4Weight(
        empty(*packed, dtype=storage),
        empty(blocks, dtype=torch.uint8),
        (rows, columns),
        _BLOCK,
        empty(-(-blocks // _NESTED_BLOCK)),
        empty(256),
        empty(),
    )


def _name_tensors(model: nn.Module, tracer: Tracer, category: str) -> None:
    for parameter in model.parameters():
        tracer.name(parameter, category)
    for buffer in model.buffers():
        tracer.name(buffer, BUFFERS if category == PARAMETERS else category)
