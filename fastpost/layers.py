"""Fused forwards for the layers of a transformer: RMSNorm, the gated MLP, linear and adapted ones.

`attach(model)` gives modules of the classes below, and plain `nn.Linear`, an instance `forward`
that runs `fastpost_kernels.rms_norm`, `swiglu` or `linear`, and PEFT's layers that of
`adapted_layers`; `detach(model)` takes it away again. On GPUs the first three come with the model
(`use_kernels=True`) or from Liger: there only the adapted layers get theirs.
Where those cannot serve (tensors elsewhere, mixed dtypes, another activation) the replaced forward
computes what the class's own does. Submodules are called as modules, so adapters and hooks on them
keep working. A deep copy of an attached model is attached itself, to its own weights.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from fastpost import adapted_layers
from fastpost_kernels import linear, rms_norm, swiglu

__all__ = ["GATED_MLPS", "RMS_NORMS", "attach", "detach"]

_MODELS = "transformers.models."

RMS_NORMS = frozenset(
    {
        (_MODELS + "deepseek_v3.modeling_deepseek_v3", "DeepseekV3RMSNorm"),
        (_MODELS + "glm4.modeling_glm4", "Glm4RMSNorm"),
        (_MODELS + "granite.modeling_granite", "GraniteRMSNorm"),
        (_MODELS + "llama.modeling_llama", "LlamaRMSNorm"),
        (_MODELS + "mistral.modeling_mistral", "MistralRMSNorm"),
        (_MODELS + "mixtral.modeling_mixtral", "MixtralRMSNorm"),
        (_MODELS + "phi3.modeling_phi3", "Phi3RMSNorm"),
        (_MODELS + "qwen2.modeling_qwen2", "Qwen2RMSNorm"),
        (_MODELS + "qwen3.modeling_qwen3", "Qwen3RMSNorm"),
        (_MODELS + "qwen3_moe.modeling_qwen3_moe", "Qwen3MoeRMSNorm"),
        (_MODELS + "smollm3.modeling_smollm3", "SmolLM3RMSNorm"),
    }
)
"""(module, class) whose forward is `weight * normalised.to(dtype)`. Gemma's, Olmo 2's and 3's and
GPT-OSS's are not: they multiply by the weight before they round."""

GATED_MLPS = frozenset(
    {
        (_MODELS + "cohere2.modeling_cohere2", "Cohere2MLP"),
        (_MODELS + "deepseek_v3.modeling_deepseek_v3", "DeepseekV3MLP"),
        (_MODELS + "granite.modeling_granite", "GraniteMLP"),
        (_MODELS + "llama.modeling_llama", "LlamaMLP"),
        (_MODELS + "mistral.modeling_mistral", "MistralMLP"),
        (_MODELS + "olmo3.modeling_olmo3", "Olmo3MLP"),
        (_MODELS + "qwen2.modeling_qwen2", "Qwen2MLP"),
        (_MODELS + "qwen3.modeling_qwen3", "Qwen3MLP"),
        (_MODELS + "qwen3_moe.modeling_qwen3_moe", "Qwen3MoeMLP"),
        (_MODELS + "smollm3.modeling_smollm3", "SmolLM3MLP"),
    }
)
"""(module, class) whose forward is `down_proj(act_fn(gate_proj(x)) * up_proj(x))`."""

_SILUS = frozenset(
    {
        ("torch.nn.modules.activation", "SiLU"),
        ("transformers.activations", "SiLUActivation"),
    }
)

# Below this a call is bound by its launch, which eager operators do faster (decoding, for one):
# measured break-even of forward and backward.
_MIN_NORM_ELEMENTS = 1 << 14
_MIN_GATE_ELEMENTS = 1 << 17


def attach(model: nn.Module) -> list[str]:
    """Gives the layers of `model` that are known a fused forward.

    Modules that have an instance `forward` already (from hooks, `kernelize`, an earlier call) are
    left alone, and so are MLPs whose activation is not SiLU.

    Returns:
        The names of the modules that got one, as in `model.named_modules()`.
    """
    attached = []
    is_on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    for name, module in model.named_modules():
        forward = _adapted_forward_for(module)
        if forward is None and is_on_cpu:
            forward = _fused_forward(module)
        if forward is not None and "forward" not in module.__dict__:
            module.__dict__["forward"] = types.MethodType(forward, module)
            attached.append(name)
    return attached


def detach(model: nn.Module) -> None:
    """Takes the fused forwards away; forwards that others put in their place since stay."""
    for module in model.modules():
        forward = getattr(module.__dict__.get("forward"), "__func__", None)
        if forward is not None and forward in _FORWARDS + adapted_layers.FORWARDS:
            del module.__dict__["forward"]


def _fused_forward(module: nn.Module) -> Any:
    """The forward that serves `module`, or None."""
    name = adapted_layers.class_name(module)
    if name in RMS_NORMS:
        return _rms_norm_forward
    if name in GATED_MLPS and adapted_layers.class_name(module.act_fn) in _SILUS:
        return _gated_mlp_forward
    if type(module) is nn.Linear:
        return _linear_forward
    return None


def _is_served(min_elements: int, *tensors: Tensor) -> bool:
    """Whether the C++ passes take them and gain: plain CPU tensors, one dtype, not tiny."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.bfloat16)
        and first.numel() >= min_elements
        # Subclasses (DTensor, quantised weights) bring operators of their own.
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == first.dtype for t in tensors)
    )


def _rms_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    # Under autocast too: the class computes in fp32 and multiplies in the dtypes it is given.
    if not _is_served(_MIN_NORM_ELEMENTS, hidden_states, self.weight):
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated_mlp_forward(self: Any, x: Tensor) -> Tensor:
    shared = adapted_layers.group_forward([self.gate_proj, self.up_proj], x)
    gate, up = shared or (self.gate_proj(x), self.up_proj(x))
    is_plain = gate.shape == up.shape and _is_plain_silu(self.act_fn)
    if is_plain and _is_served(_MIN_GATE_ELEMENTS, gate, up):
        return self.down_proj(swiglu(gate, up))
    return self.down_proj(self.act_fn(gate) * up)


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    if type(self.weight) not in (Tensor, nn.Parameter) or type(input) is not Tensor:
        return type(self).forward(self, input)
    return linear(input, self.weight, self.bias)


def _is_plain_silu(activation: nn.Module) -> bool:
    """Whether calling it does no more than SiLU."""
    is_silu = adapted_layers.class_name(activation) in _SILUS
    is_own = "forward" not in activation.__dict__
    return is_silu and is_own and not adapted_layers.has_hooks(activation)


_adapted_forward_for = adapted_layers.forward_for
_FORWARDS = (_rms_norm_forward, _gated_mlp_forward, _linear_forward)

# Pickle stores a bound method as its name, to be looked up in the class on loading.
_rms_norm_forward.__name__ = _gated_mlp_forward.__name__ = _linear_forward.__name__ = "forward"
