"""PEFT's LoRA and DoRA layers on fused kernels, on plain and on 4-bit weights.

`forward_for(module)` names the forward that serves a layer of PEFT's, which `layers.attach` gives
it. Each call looks at the layer's state and takes the fused path only where it computes what PEFT
does: one active adapter, neither disabled nor merged, LoRA or DoRA, no hook on a part that would no
longer be called. Everything else (several adapters, `adapter_names`, other variants, a bias of the
adapter) runs PEFT's own forward. Adapters, configurations and files stay PEFT's.
Projections of one input share a pass over it: gate and up in the MLP's forward, and q, k and v in
that of an attention layer, which runs its class's own and whose projections find their products
made. Where they cannot (`ungrouped_projections` says why) each is a call of its own.

Two differences, both on purpose: adapters kept in fp32 beside a bf16 layer are multiplied in bf16,
with their gradients in fp32 (PEFT widens the layer's input instead); and dropout is drawn from a
counter, so masks differ from PEFT's, and DoRA drops the adapter's input only.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastpost_kernels import (
    LoraWeights,
    Nf4Weight,
    dora_linear,
    dora_weight_norm,
    lora_linear,
    lora_linears,
    nf4_linear,
    row_square_norms,
)
from fastpost_kernels.dora_linear import scale_columns, scale_own_columns

__all__ = [
    "ATTENTIONS",
    "FORWARDS",
    "class_name",
    "forward_for",
    "group_forward",
    "has_hooks",
    "unfused_adapters",
    "ungrouped_projections",
]

_PEFT = "peft.tuners.lora."
_LAYERS = frozenset({(_PEFT + "layer", "Linear"), (_PEFT + "bnb", "Linear4bit")})
_DORA = (_PEFT + "variants", "DoraLinearVariant")
_BNB_LINEAR = ("bitsandbytes.nn.modules", "Linear4bit")
_NF4_LINEAR = ("fastpost.adapters.nf4_layer", "Nf4Linear")
_MAX_SEED = 2**62

_MODELS = "transformers.models."
ATTENTIONS = frozenset(
    {
        (_MODELS + "cohere2.modeling_cohere2", "Cohere2Attention"),
        (_MODELS + "gemma2.modeling_gemma2", "Gemma2Attention"),
        (_MODELS + "gemma3.modeling_gemma3", "Gemma3Attention"),
        (_MODELS + "glm4.modeling_glm4", "Glm4Attention"),
        (_MODELS + "granite.modeling_granite", "GraniteAttention"),
        (_MODELS + "llama.modeling_llama", "LlamaAttention"),
        (_MODELS + "mistral.modeling_mistral", "MistralAttention"),
        (_MODELS + "mixtral.modeling_mixtral", "MixtralAttention"),
        (_MODELS + "olmo2.modeling_olmo2", "Olmo2Attention"),
        (_MODELS + "olmo3.modeling_olmo3", "Olmo3Attention"),
        (_MODELS + "qwen2.modeling_qwen2", "Qwen2Attention"),
        (_MODELS + "qwen3.modeling_qwen3", "Qwen3Attention"),
        (_MODELS + "qwen3_moe.modeling_qwen3_moe", "Qwen3MoeAttention"),
        (_MODELS + "smollm3.modeling_smollm3", "SmolLM3Attention"),
    }
)
"""(module, class) whose forward multiplies `hidden_states`, as it came, with the three below."""
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
_SHARING = ("fastpost.adapted_layers", "fastpost.layers")  # whose forwards share a pass

# Any optimizer's step may have changed an adapter, also one that writes past autograd's versions.
_steps_done = 0
# Whether an optimizer of this process group had sharded parameters; None before the first step.
_is_sharded: bool | None = None


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    global _is_sharded, _steps_done
    _steps_done += 1
    if _in_process_group() and not _is_sharded:
        _is_sharded = any(
            isinstance(parameter, DTensor)
            for group in optimizer.param_groups
            for parameter in group["params"]
        )


def _in_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


register_optimizer_step_post_hook(_count_step)


class Adapter(NamedTuple):
    """What one call of an adapted layer multiplies."""

    weight: Tensor | Nf4Weight
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    dropout_p: float
    magnitude: Tensor | None  # of DoRA
    compute_dtype: torch.dtype | None  # that a 4-bit layer asks for


class _Norms(NamedTuple):
    key: tuple[Any, ...]
    square: Tensor
    norm: Tensor


_NORMS: weakref.WeakKeyDictionary[nn.Module, _Norms] = weakref.WeakKeyDictionary()


def forward_for(module: nn.Module) -> Any:
    """The forward that serves `module`, or None."""
    if class_name(module) in _LAYERS:
        return _adapted_forward
    if class_name(module) in ATTENTIONS and len(_adapted_parts(module, _QUERY_KEY_VALUE)) > 1:
        return _attention_forward
    return None


def unfused_adapters(model: nn.Module) -> Counter[str]:
    """Reason -> adapted layers of `model` that run PEFT's forward as they stand now."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            if forward_for(module) is None:
                found[f"a layer of class {type(module).__qualname__}"] += 1
            elif isinstance(reason := _adapter_of(module), str):
                found[reason] += 1
    return found


def ungrouped_projections(model: nn.Module) -> Counter[str]:
    """Reason -> groups of adapted projections of one input that do not share a pass over it."""
    found: Counter[str] = Counter()
    for module in model.modules():
        for names in (_QUERY_KEY_VALUE, _GATE_UP):
            parts = _adapted_parts(module, names)
            if len(parts) < 2:
                continue
            forward = getattr(module.__dict__.get("forward"), "__func__", None)
            if getattr(forward, "__module__", None) not in _SHARING:
                found[f"{type(module).__qualname__} runs its own forward"] += 1
            elif isinstance(reason := _group_of(parts), str):
                found[reason] += 1
    return found


def group_forward(modules: list[nn.Module], x: Tensor) -> list[Tensor] | None:
    """Outputs of several adapted layers on one input, read once; None where they cannot share."""
    adapters = _group_of(modules)
    if isinstance(adapters, str) or not all(_fits(adapter, x) for adapter in adapters):
        return None
    layers = []
    for weight, bias, a, b, scale, _, magnitude, _ in adapters:
        assert isinstance(weight, Tensor)
        layers.append(LoraWeights(weight, bias if magnitude is None else None, a, b, scale))
    outputs = lora_linears(x if x.dim() < 3 else x.reshape(-1, x.shape[-1]), layers)
    own: list[int] = []
    magnitudes, norms = [], []
    for i, (module, adapter) in enumerate(zip(modules, adapters, strict=True)):
        if adapter.magnitude is None:
            continue
        norm = _weight_norm(module, adapter)
        if adapter.bias is not None:
            outputs[i] = scale_columns(outputs[i], adapter.magnitude, norm, adapter.bias)
            continue
        own.append(i)
        magnitudes.append(adapter.magnitude)
        norms.append(norm)
    if own:
        scaled = scale_own_columns([outputs[i] for i in own], magnitudes, norms)
        for i, y in zip(own, scaled, strict=True):
            outputs[i] = y
    if x.dim() < 3:
        return outputs
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def _group_of(modules: list[nn.Module]) -> list[Adapter] | str:
    """The layers' adapters, or why they cannot share a pass over their input."""
    adapters = []
    for module in modules:
        forward = getattr(module.__dict__.get("forward"), "__func__", None)
        if forward is not _adapted_forward:
            return "a projection that is not adapted, or has a forward of its own"
        if has_hooks(module):
            return "a hook on a projection"
        adapter = _adapter_of(module)
        if isinstance(adapter, str):
            return adapter
        if isinstance(adapter.weight, Nf4Weight):
            return "4-bit weights"
        if adapter.dropout_p > 0:  # one mask would serve all, where PEFT draws one for each
            return "lora_dropout"
        adapters.append(adapter)
    return adapters


def _adapted_parts(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Those of a module's children by these names that are layers of PEFT's."""
    parts = (module._modules.get(name) for name in names)
    return [part for part in parts if part is not None and class_name(part) in _LAYERS]


def _attention_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    x: Any = args[0] if args else kwargs.get("hidden_states")
    parts = _adapted_parts(self, _QUERY_KEY_VALUE)
    # a compiler breaks at what is handed over; it gets the projections one by one
    is_traced = torch.compiler.is_compiling()
    outputs = group_forward(parts, x) if len(parts) > 1 and not is_traced else None
    if outputs is None:
        return type(self).forward(self, *args, **kwargs)
    for part, y in zip(parts, outputs, strict=True):
        part.__dict__["_prepared"] = x, y
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        for part in parts:
            part.__dict__.pop("_prepared", None)


def _adapted_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    asks_more = args or any(value is not None for value in kwargs.values())
    if not torch.compiler.is_compiling():
        prepared = self.__dict__.pop("_prepared", None)
        if prepared is not None and prepared[0] is x and not asks_more:
            return prepared[1]
    adapter = "arguments" if asks_more else _adapter_of(self)
    if isinstance(adapter, str) or not _fits(adapter, x):
        return type(self).forward(self, x, *args, **kwargs)
    weight, bias, a, b, scale, dropout_p, magnitude, compute_dtype = adapter
    seed = int(torch.randint(_MAX_SEED, ())) if dropout_p > 0 else None
    given, result_dtype = x, x.dtype
    if compute_dtype is not None and not torch.is_autocast_enabled(x.device.type):
        given = x.to(compute_dtype)
    if magnitude is not None:
        norm = _weight_norm(self, adapter)
        y = dora_linear(
            given, weight, bias, a, b, scale, magnitude, norm, dropout_p=dropout_p, seed=seed
        )
    elif isinstance(weight, Nf4Weight):
        y = nf4_linear(given, weight, bias, a=a, b=b, scale=scale, dropout_p=dropout_p, seed=seed)
    else:
        y = lora_linear(given, weight, bias, a, b, scale, dropout_p=dropout_p, seed=seed)
    return y if torch.is_autocast_enabled(x.device.type) else y.to(result_dtype)


def _adapter_of(module: Any) -> Adapter | str:
    """The layer's only active adapter, or why PEFT's forward has to run."""
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged:
        return "an adapter is merged"
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1:
        return f"{len(names)} active adapters"
    name = names[0]
    variant = module.lora_variant.get(name)
    is_dora = variant is not None and class_name(variant) == _DORA
    if variant is not None and not is_dora:
        return f"variant {type(variant).__qualname__}"
    if module.lora_bias.get(name, False):
        return "lora_bias"
    if getattr(module, "fan_in_fan_out", False):
        return "fan_in_fan_out"
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    parts = [module.base_layer, a, b, dropout]
    if is_dora:
        parts.append(module.lora_magnitude_vector[name])
    if any(has_hooks(part) for part in parts):
        return "a hook on a part of the layer"
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None:
        return "matrices that are not linear layers"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"dropout of class {type(dropout).__qualname__}"
    weight = _weight_of(module.base_layer)
    if isinstance(weight, str):
        return weight
    is_dropping = type(dropout) is nn.Dropout and dropout.training
    compute_dtype = getattr(module.base_layer, "compute_dtype", None)
    return Adapter(
        weight,
        module.base_layer.bias,
        a.weight,
        b.weight,
        module.scaling[name],
        dropout.p if is_dropping else 0.0,
        module.lora_magnitude_vector[name].weight if is_dora else None,
        compute_dtype if isinstance(weight, Nf4Weight) else None,
    )


def _weight_of(base: Any) -> Tensor | Nf4Weight | str:
    """The base layer's weight, or why the kernels cannot read it."""
    if type(base) is nn.Linear:
        return base.weight if _is_plain(base.weight) else f"a {type(base.weight).__name__} weight"
    if class_name(base) == _NF4_LINEAR:
        own: Nf4Weight = base.nf4
        return own if _is_plain(own.packed) else f"a {type(own.packed).__name__} weight"
    if class_name(base) != _BNB_LINEAR:
        return f"a base layer of class {type(base).__qualname__}"
    state = getattr(base.weight, "quant_state", None)
    if state is None or state.quant_type != "nf4" or len(state.shape) != 2:
        return "a 4-bit weight that is not NF4"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes repacked the weight for inference"
    nested = state.state2
    return Nf4Weight(
        base.weight.data,
        state.absmax,
        (state.shape[0], state.shape[1]),
        state.blocksize,
        None if nested is None else nested.absmax,
        None if nested is None else nested.code,
        state.offset,
    )


def _fits(adapter: Adapter, x: Tensor) -> bool:
    """Whether the kernels take `x`: a plain floating tensor in the layer's dtype or cast to one."""
    if type(x) is not Tensor or not x.dtype.is_floating_point or x.dim() == 0:
        return False
    if not (_is_plain(adapter.a) and _is_plain(adapter.b)):
        return False
    if torch.is_autocast_enabled(x.device.type) or isinstance(adapter.weight, Nf4Weight):
        return True
    return x.dtype == adapter.weight.dtype


def _weight_norm(module: nn.Module, adapter: Adapter) -> Tensor:
    """DoRA's norm, computed once per optimizer step."""
    # the wrapper that keeps compilers out costs more than finding a norm that is kept
    find = _hidden_norm if torch.compiler.is_compiling() else _kept_norm
    return find(module, adapter)


def _kept_norm(module: nn.Module, adapter: Adapter) -> Tensor:
    a, b = adapter.a, adapter.b
    plain = adapter.weight if isinstance(adapter.weight, Tensor) else adapter.weight.packed
    base = (plain.data_ptr(), plain._version, plain.device)
    # A sharded parameter is gathered into memory whose version says nothing of its content.
    may_be_gathered = _in_process_group() and _is_sharded is not False
    key = (*base, _steps_done, adapter.scale, a.data_ptr(), a._version, b.data_ptr(), b._version)
    kept = _NORMS.get(module)
    if kept is not None and kept.key == key and not may_be_gathered:
        return kept.norm
    is_same_base = kept is not None and kept.key[:3] == base and not may_be_gathered
    square = kept.square if is_same_base and kept is not None else row_square_norms(adapter.weight)
    norm = dora_weight_norm(adapter.weight, a.detach(), b.detach(), adapter.scale, square)
    _NORMS[module] = _Norms(key, square, norm)
    return norm


# what is kept changes every step, and would be compiled in
_hidden_norm = torch.compiler.disable(_kept_norm)


def _is_plain(tensor: Any) -> bool:
    """Not a subclass, whose operators are its own (DTensor, quantised weights)."""
    return type(tensor) in (Tensor, nn.Parameter)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks must see their call."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(hooks)


def class_name(module: Any) -> tuple[str, str]:
    """Where a class is defined and its name: known without importing its library."""
    return type(module).__module__, type(module).__qualname__


FORWARDS = (_adapted_forward, _attention_forward)
# Pickle stores a bound method as its name, to be looked up in the class on loading.
_adapted_forward.__name__ = _attention_forward.__name__ = "forward"
