"""The model of stock TRL as its trainers, PEFT, bitsandbytes and accelerate set it up.

    weights       trained ones are fp32 (TRL's default dtype, and what accelerate's FSDP2 makes of
                  others); frozen ones bf16, which TRL must be told to load: the default is fp32
    4 bits        bitsandbytes' Linear4bit, NF4 with double quantisation, adapters cast to bf16
    FSDP2         accelerate's units: each decoder layer; the embedding; last norm and head, which
                  stay gathered; TRL's units of a reference: one, so that all of it is gathered
    checkpointing TRL's default: each layer is recomputed

accelerate looks for the last norm among the children of PEFT's wrapper, where it is not: with an
adapter the head is a unit alone, whose weight TRL's head then gathers for itself.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from accelerate.utils.fsdp_utils import _find_final_norm
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from trl.trainer.utils import add_fused_lm_head

from fastpost.planning.ledger import BUFFERS, PARAMETERS, REFERENCE
from fastpost.planning.models import make_model
from fastpost.planning.request import Request
from fastpost.planning.sharding import decoder_layers
from fastpost.planning.tracer import Tracer

__all__ = ["make_policy", "make_reference"]

_BLOCK, _NESTED_BLOCK = 64, 256
# fields that TRL's trainers ask the head for
_OUTPUTS = {
    "sft": ("log_probs", "entropy", "is_top1"),
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "grpo": ("log_probs", "entropy"),
}


def make_policy(request: Request, config: Any, tracer: Tracer) -> Any:
    """The trained model. Call it within `tracer.tracing()`."""
    adapter = request.adapter
    model: Any = make_model(config, torch.float32 if adapter is None else torch.bfloat16)
    if adapter is not None:
        if adapter.kind == "qlora":
            _quantize(model)
        lora = LoraConfig(
            r=adapter.rank,
            lora_alpha=2 * adapter.rank,
            target_modules="all-linear",
            use_dora=adapter.kind == "dora",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
        if request.checkpointing:
            model.enable_input_require_grads()
        if adapter.kind == "qlora":
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
    base = model if adapter is None else model.get_base_model()
    add_fused_lm_head(base, outputs=_OUTPUTS[request.method])
    if request.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if request.num_gpus > 1:
        _shard(model, request.num_gpus)
    else:
        _cast(model)
    model.train()
    _name(model, tracer, PARAMETERS, BUFFERS)
    return model


def make_reference(request: Request, config: Any, tracer: Tracer) -> Any:
    """The frozen second model of a DPO that trains all weights, in their dtype."""
    model: Any = make_model(config, torch.float32)
    add_fused_lm_head(model)
    if request.num_gpus > 1:
        fully_shard(model, mesh=_mesh(request.num_gpus), mp_policy=_policy())
    else:
        _cast(model)
    model.eval()
    _name(model, tracer, REFERENCE, REFERENCE)
    return model


def _cast(model: Any) -> None:
    """accelerate's bf16 of a model that is not sharded."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    model.forward = convert_outputs_to_fp32(autocast(model.forward))


def _shard(model: Any, count: int) -> None:
    """accelerate's `fsdp2_prepare_model` of a model that is wrapped by its decoder layers."""
    options = {"mesh": _mesh(count), "mp_policy": _policy()}
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = embedding.weight is head.weight
    if not is_tied:
        fully_shard(embedding, **options)
    tail = [_find_final_norm(model), *([embedding] if is_tied else []), head]
    fully_shard([m for m in tail if m is not None], **options, reshard_after_forward=False)
    fully_shard(model, **options)


def _mesh(count: int) -> Any:
    with unset_fake_temporarily():
        return init_device_mesh("cpu", (count,))


def _policy() -> MixedPrecisionPolicy:
    """accelerate's, of bf16."""
    bf16 = torch.bfloat16
    return MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=bf16, output_dtype=bf16)


def _quantize(model: Any) -> None:
    """What `from_pretrained` with `BitsAndBytesConfig(load_in_4bit=True)` makes of a model."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.endswith("lm_head"):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _four_bit(module))
    model.is_loaded_in_4bit = True


def _four_bit(module: nn.Linear) -> Linear4bit:
    with unset_fake_temporarily():  # its class of parameters cannot be of fake tensors
        layer = Linear4bit(1, 1, False, torch.bfloat16, True, "nf4")
    layer.in_features, layer.out_features = module.in_features, module.out_features
    count = module.weight.numel()
    blocks = -(-count // _BLOCK)
    weight: Any = nn.Parameter(torch.empty((count // 2, 1), dtype=torch.uint8), False)
    weight.quant_state = QuantState(
        torch.empty(blocks, dtype=torch.uint8),
        torch.Size(module.weight.shape),
        torch.empty(16),
        _BLOCK,
        "nf4",
        torch.bfloat16,
        torch.empty(()),
        QuantState(
            torch.empty(-(-blocks // _NESTED_BLOCK)),
            code=torch.empty(256),
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        ),
    )
    weight.compress_statistics, weight.quant_type = True, "nf4"
    layer.weight = weight
    return layer


def _name(model: nn.Module, tracer: Tracer, parameters: str, buffers: str) -> None:
    for parameter in model.parameters():
        tracer.name(parameter, parameters)
        for tensor in _statistics(parameter):
            tracer.name(tensor, parameters)
    for buffer in model.buffers():
        tracer.name(buffer, buffers)


def _statistics(parameter: Any) -> list[Tensor]:
    """Tensors of a 4-bit weight beside its bytes."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
