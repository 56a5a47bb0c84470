"""Packed attention under any transformers model, without touching its code.

Transformers looks its attention up in `ALL_ATTENTION_FUNCTIONS` at every call and hands unknown
keyword arguments down to it. While installed, every entry of that table is wrapped: a call that
carries `prefix_plan` runs `fastpost_kernels.prefix_attention`, any other call runs the original
with its arguments untouched. Wrapping beats a name of our own: `generate`, checkpointing and
configs keep seeing the name they know.

Only "eager" has no entry (each modelling file brings its own function), and Gemma2 and GPT-OSS are
eager by default for their softcap and sinks. `attach` switches such a model to the name
"fastpost_eager", which does the same dispatch and falls back to that file's own function.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastpost_kernels import prefix_attention

__all__ = [
    "EAGER_NAME",
    "SUPPORTED",
    "attach",
    "detach",
    "dummy_mask",
    "install",
    "uninstall",
    "unsupported_reason",
]

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

EAGER_NAME = "fastpost_eager"

SUPPORTED = frozenset(
    {
        "cohere2",
        "deepseek_v3",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt_oss",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)
"""`config.model_type` of the models proved equal to stock, output and gradients, by the tests."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass
class _SwitchedConfig:
    """An eager config while it is switched to `EAGER_NAME`, by `count` attached models."""

    config: PreTrainedConfig  # held, so that its id stays its own
    implementation: str | None
    count: int


_originals: dict[str, AttentionFunction] = {}
_num_installs = 0
_switched: dict[int, _SwitchedConfig] = {}


def install() -> None:
    """Wraps transformers' attention functions. Counted: each call needs one `uninstall`."""
    global _num_installs
    _num_installs += 1
    if _num_installs > 1:
        return
    for name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        # Paged attention belongs to continuous batching, which never trains.
        if not name.startswith("paged|"):
            _originals[name] = ALL_ATTENTION_FUNCTIONS[name]
            AttentionInterface.register(name, _dispatching(_originals[name]))
    AttentionInterface.register(EAGER_NAME, _dispatching(_eager_of_module))
    AttentionMaskInterface.register(EAGER_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def uninstall() -> None:
    """Undoes one `install`; the last one puts the original function objects back.

    Raises:
        RuntimeError: if nothing is installed.
    """
    global _num_installs
    if _num_installs == 0:
        raise RuntimeError("uninstall() without a matching install()")
    _num_installs -= 1
    if _num_installs > 0:
        return
    for name, original in _originals.items():
        AttentionInterface.register(name, original)
    _originals.clear()
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop(EAGER_NAME)


def attach(model: nn.Module) -> None:
    """Installs the wrappers and lets `model` reach them, whatever implementation it is set to.

    Counted like `install`, also where two models share a config: each call needs one `detach`.

    Raises:
        ValueError: if `unsupported_reason` names one.
    """
    reason = unsupported_reason(model)
    if reason is not None:
        raise ValueError(f"prefix-shared attention cannot run in {type(model).__name__}: {reason}")
    install()
    for config in _configs(model):
        if config._attn_implementation in ("eager", None):
            _switched[id(config)] = _SwitchedConfig(config, config._attn_implementation, 0)
            # The property's setter would also overwrite sub-configs set apart on purpose.
            config._attn_implementation_internal = EAGER_NAME
        if id(config) in _switched:
            _switched[id(config)].count += 1


def detach(model: nn.Module) -> None:
    """Undoes one `attach`; after the last one the config names its own implementation again.

    Raises:
        RuntimeError: if nothing is attached.
    """
    uninstall()
    for config in _configs(model):
        switched = _switched.get(id(config))
        if switched is None:
            continue
        switched.count -= 1
        if switched.count == 0:
            config._attn_implementation_internal = switched.implementation
            del _switched[id(config)]


def unsupported_reason(model: nn.Module) -> str | None:
    """Says why `model` cannot run packed with shared prefixes, or None if it can."""
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in SUPPORTED:
        return f"model type {model_type!r} is not among the verified {sorted(SUPPORTED)}"
    layer_types = set(getattr(config, "layer_types", None) or _LAYER_TYPES)
    if not layer_types <= _LAYER_TYPES:
        return f"its layers include {sorted(layer_types - _LAYER_TYPES)}, which are not attention"
    is_bidirectional = getattr(config, "use_bidirectional_attention", None)
    if is_bidirectional or not getattr(config, "is_causal", True):
        return "its attention is bidirectional"
    if getattr(config, "attention_dropout", 0.0):
        return (
            f"attention_dropout is {config.attention_dropout}: rows that share a token would share "
            "its dropout; set it to 0"
        )
    implementation = config._attn_implementation or "eager"
    if implementation.startswith("paged|"):
        return f"attention implementation {implementation!r} is for generation"
    return None


def dummy_mask(dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Returns the `attention_mask` [1, 1, 1, 1] to pass to a backbone along with a plan.

    Transformers takes a 4-D mask as finished and hands it through for full and sliding layers
    alike, so that no [1, 1, N, N] mask is built. The packed attention never reads it.
    """
    return torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The distinct configs the modules of `model` hold, usually one object shared by all."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in configs if isinstance(c, PreTrainedConfig)}.values())


def _dispatching(original: AttentionFunction) -> AttentionFunction:
    """Wraps `original`: ours if the call carries a plan, else the original, arguments untouched."""

    @functools.wraps(original)
    def attention_forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if kwargs.get("prefix_plan") is None:
            return original(module, query, key, value, *args, **kwargs)
        return _packed_attention_forward(module, query, key, value, *args, **kwargs)

    return attention_forward


def _eager_of_module(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Runs `eager_attention_forward` of the file that defines the module's class."""
    for cls in type(module).__mro__:  # wrappers such as FSDP2 put a class of their own in front
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager(module, *args, **kwargs)
    raise TypeError(
        f"{type(module).__name__} has no eager_attention_forward in its modelling file; "
        "load the model with attn_implementation='sdpa'"
    )


def _packed_attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, Hq, N, D]
    key: Tensor,  # [1, Hk, N, D]
    value: Tensor,  # [1, Hk, N, Dv]
    attention_mask: Tensor | None = None,
    *,
    prefix_plan: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **_: Any,  # what transformers hands down for other implementations: position_ids, use_cache, …
) -> tuple[Tensor, None]:
    """Returns (out [1, N, Hq, Dv] contiguous, None), as `sdpa_attention_forward` does.

    `attention_mask` is the dummy; the pattern comes from `prefix_plan.segments`.

    Raises:
        ValueError: for what packed attention cannot do.
    """
    if query.shape[0] != 1:
        raise ValueError(
            f"a packed batch has one row, got query {list(query.shape)}; pass the plan's unique "
            "tokens as input_ids[None]"
        )
    if dropout:
        raise ValueError(f"attention dropout must be 0 with shared prefixes, got {dropout}")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} is not causal; packed attention is")
    if position_bias is not None:
        raise ValueError(f"{type(module).__name__} adds a position bias; packed attention cannot")
    if output_attentions:
        raise ValueError("output_attentions=True: packed attention never forms the weights")
    if torch.is_autocast_enabled(query.device.type):  # as PyTorch does for its own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = prefix_attention(
        query[0],
        key[0],
        value[0],
        prefix_plan.segments,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux if s_aux is not None else sinks,
    )
    return out.transpose(0, 1).unsqueeze(0), None
