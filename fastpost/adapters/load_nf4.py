"""Loads a causal language model in 4 bits, one shard of its file at a time.

The model is built without memory; then each tensor is read, quantised where it belongs to a linear
layer, and let go. The host holds one shard (mapped from the file), the model in 4 bits, and while
one weight is quantised, some 20 bytes for each of its elements (on the device, if there is one).
Folders that bitsandbytes has quantised load as they are. What comes back is an ordinary model with
`Nf4Linear` in place of `nn.Linear`; its `save_pretrained` writes bitsandbytes' format.

Not read: formats other than safetensors, and files whose tensors have other names than the model's
parameters (mixtures whose experts are stored one by one and held as one parameter).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from fastpost.adapters.nf4_coverage import coverage_of
from fastpost.adapters.nf4_layer import Nf4Linear
from fastpost.adapters.nf4_state import QUANT_STATE, unpack_state
from fastpost.adapters.weight_files import WeightFolder, release_freed
from fastpost.backbone import FastpostWarning
from fastpost_kernels import nf4_quantize

__all__ = ["KEPT_MODULES", "load_nf4"]

KEPT_MODULES = ("lm_head", "gate", "router")
"""Names of linear layers that stay in 16 bits: heads, and routers, whose choices are discrete."""

_COMPANION = re.compile(r"\.weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)$")
_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]


def load_nf4(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    skip: Sequence[str] = KEPT_MODULES,
    block_size: int = 64,
    double_quant: bool = True,
    storage: torch.dtype = torch.uint8,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """`AutoModelForCausalLM` of `model` with its linear layers in 4-bit NormalFloat, frozen.

    Train adapters on it, with PEFT as on any model. `coverage_of(model)` tells what is quantised.

    Args:
        model: a folder with safetensors, or the name of a repository on the Hub.
        dtype: of everything else, and what the layers compute in.
        device: where the model goes, and where weights are quantised; a GPU if there is one.
        skip: linear layers that stay in `dtype`, by a part of their dotted name.
        block_size, double_quant, storage: as in `nf4_quantize`; a folder that is quantised already
            keeps its own, as it does its choice of layers.
        revision: of a repository on the Hub.
        attn_implementation: as in `from_pretrained`.

    Raises:
        ValueError: no safetensors; a folder quantised otherwise; parameters that no file holds,
            such as experts stored one by one; tensors of other shapes; nothing to quantise.

    Warns:
        FastpostWarning: experts kept as 3-D parameters, which are not quantised; tensors of the
            files that the model has no place for.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = _folder(model, revision)
    folder = WeightFolder(path)
    config = AutoConfig.from_pretrained(path)
    stored = _quantized_by(folder, getattr(config, "quantization_config", None))
    built = _without_memory(config, dtype, attn_implementation)
    missing = _check_names(folder, built)

    def quantize(name: str, tensor: Tensor, read: Callable[[str], Tensor]) -> Any:
        if stored:
            return unpack_state(name, tensor, read)
        return nf4_quantize(
            tensor.to(target), block_size=block_size, double_quant=double_quant, storage=storage
        )

    chosen = stored or {
        f"{name}.weight"
        for name, module in built.named_modules()
        if type(module) is nn.Linear and not set(name.split(".")) & set(skip)
    }
    if not chosen:
        raise ValueError(
            f"{type(built).__name__} has no nn.Linear outside of {tuple(skip)}: nothing of it "
            "would be quantised; use from_pretrained"
        )
    for file, names in folder.shards.items():
        with safe_open(folder.folder / file, "pt") as shard:
            for name in names:
                if name in missing.unexpected or _COMPANION.search(name):
                    continue
                tensor = shard.get_tensor(name)
                if name in chosen:
                    layer = _layer(built, name, quantize(name, tensor, folder.read), dtype)
                    _replace(built, name.removesuffix(".weight"), layer.to(target))
                else:
                    _assign(built, name, tensor, dtype, target)
                del tensor
                if name in chosen and target.type == "cpu":
                    release_freed()
    built.tie_weights(missing_keys=missing.absent)
    return _finished(built, folder, str(model), target)


class _Names:
    """Names in which files and model differ."""

    def __init__(self, absent: set[str], unexpected: set[str]) -> None:
        self.absent = absent
        self.unexpected = unexpected


def _folder(model: str | Path, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(str(model), revision=revision, allow_patterns=_FILES))


def _quantized_by(folder: WeightFolder, quantization: Any) -> set[str]:
    """The weights that the files hold in 4 bits already."""
    ending = "." + QUANT_STATE
    stored = {name.removesuffix(ending) for name in folder.shard_of if name.endswith(ending)}
    if quantization is not None and not stored:
        raise ValueError(
            f"{folder.folder} is quantised otherwise than in NF4 by bitsandbytes "
            f"({quantization}): give the model in 16 bits"
        )
    return stored


def _without_memory(config: Any, dtype: torch.dtype, attn_implementation: str | None) -> Any:
    """The model with parameters on the meta device and buffers, which no file holds, real."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )


def _check_names(folder: WeightFolder, model: Any) -> _Names:
    """Refuses files without some of the model's parameters; tied ones need one name of several."""
    expected, found = set(model.state_dict()), set(folder.shard_of)
    absent = expected - found
    tied = model.all_tied_weights_keys
    lost = {
        name
        for name in absent - set(tied)
        if not any(source == name and target in found for target, source in tied.items())
    }
    lost |= {name for name in absent & set(tied) if tied[name] in lost}
    if lost:
        first = min(lost)
        experts = sorted(name for name in lost if model.get_parameter(name).dim() == 3)
        reason = (
            "they are missing, or stored under names that from_pretrained converts, which is not "
            "done here: use from_pretrained in 16 bits"
        )
        if experts:
            reason = (
                f"{len(experts)} of them, first {experts[0]!r}, hold all experts of a layer as one "
                "3-D parameter, which the files store otherwise: such mixtures cannot be loaded "
                "in NF4; use from_pretrained in 16 bits"
            )
        raise ValueError(
            f"{folder.folder} lacks {len(lost)} of the model's {len(expected)} tensors, first "
            f"{first!r}; {reason}"
        )
    unexpected = {name for name in found - expected if not _COMPANION.search(name)}
    ignored = model._keys_to_ignore_on_load_unexpected or []
    told = sorted(n for n in unexpected if not any(re.search(pattern, n) for pattern in ignored))
    told = [name for name in told if not name.endswith("rotary_emb.inv_freq")]
    if told:
        warnings.warn(
            f"{len(told)} tensors of {folder.folder} have no place in the model and are left out, "
            f"first {told[0]!r}",
            FastpostWarning,
            stacklevel=3,
        )
    return _Names(absent, unexpected)


def _layer(model: Any, name: str, weight: Any, dtype: torch.dtype) -> Nf4Linear:
    linear = model.get_submodule(name.removesuffix(".weight"))
    if tuple(weight.shape) != (linear.out_features, linear.in_features):
        raise ValueError(
            f"{name} is {tuple(weight.shape)} in the file, [{linear.out_features}, "
            f"{linear.in_features}] in the model: the files are of another configuration"
        )
    return Nf4Linear(weight, linear.bias, compute_dtype=dtype)


def _replace(model: Any, path: str, layer: Nf4Linear) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _assign(
    model: Any, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """A tensor that stays as it is, copied: what safetensors gives is a view of the file."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    is_buffer = leaf in module._buffers
    held = module._buffers[leaf] if is_buffer else module._parameters[leaf]
    if held.shape != tensor.shape:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} in the file, {tuple(held.shape)} in the model: the "
            "files are of another configuration"
        )
    if is_buffer or not tensor.is_floating_point():
        dtype = held.dtype
    elif set(name.split(".")) & set(model._keep_in_fp32_modules_strict or ()):
        dtype = torch.float32
    found = tensor.to(device, dtype, copy=True)
    if is_buffer:
        module._buffers[leaf] = found
    else:
        module._parameters[leaf] = nn.Parameter(found, requires_grad=False)


def _finished(model: Any, folder: WeightFolder, name: str, device: torch.device) -> Any:
    """What else `from_pretrained` does, and the checks of what came out."""
    empty = [n for n, p in model.named_parameters() if p.is_meta]
    if empty:
        raise ValueError(f"{len(empty)} parameters got no value, first {empty[0]!r}")
    model.to(device)
    model.requires_grad_(False)
    model.eval()
    if (folder.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder.folder)
    model.name_or_path = model.config._name_or_path = name
    layer = next(module for module in model.modules() if isinstance(module, Nf4Linear))
    # as a plain dictionary: the class of transformers asks for an installed bitsandbytes
    model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": layer.nested_absmax is not None,
        "bnb_4bit_compute_dtype": str(layer.compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": str(layer.storage).removeprefix("torch."),
        "llm_int8_skip_modules": [n for n, m in model.named_modules() if type(m) is nn.Linear],
    }
    if experts := coverage_of(model).experts:
        warnings.warn(
            f"{len(experts)} parameters hold the experts of a layer as one 3-D tensor and are not "
            f"quantised, first {experts[0]!r}; coverage_of(model) tells how much that is",
            FastpostWarning,
            stacklevel=3,
        )
    return model
