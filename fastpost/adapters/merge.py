"""Adapters into weights, shard by shard, and proved: the merged model says what the adapter said.

The proof loads one model after the other; the merge itself holds one shard.

    LoRA    W' = W + s B A
    DoRA    W' = m / ||W + s B A|| * (W + s B A), by rows

computed in float32 and rounded once to the weight's dtype. An adapter that was trained on 4-bit
weights learnt to correct their rounding too: with `base="nf4"` it is merged onto what those weights
stood for, dequantised. Sources: equations as in `fastpost_kernels.lora_linear` and `dora_linear`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpost.adapters.weight_files import WeightFolder, staged, write_like
from fastpost_kernels import dora_weight_norm, nf4_dequantize, nf4_quantize

__all__ = [
    "Delta",
    "MergeReport",
    "check_known",
    "log_probs",
    "merge_adapter",
    "merged_weight",
    "read_deltas",
    "token_kls",
]

BASES = ("original", "nf4")
_PREFIX = "base_model.model."


class MergeReport(NamedTuple):
    """What was merged, and how far the result is from base and adapter together."""

    layers: int
    mean_kl: float  # nats a token, of (base with adapter) from merged
    max_kl: float

    def __str__(self) -> str:
        return (
            f"merged {self.layers} layers; KL from the adapter {self.mean_kl:.2e} nats a token, "
            f"at most {self.max_kl:.2e}"
        )


class Delta(NamedTuple):
    """One layer's adapter in float32."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    scale: float
    magnitude: Tensor | None  # [N], of DoRA


def merge_adapter(
    base_folder: str | Path,
    adapter_folder: str | Path,
    output: str | Path,
    *,
    prompts: Sequence[str],
    base: str = "original",
    max_kl: float = 0.01,
) -> MergeReport:
    """Write `base_folder` with the adapter merged into `output`, which plain transformers loads.

    Args:
        base_folder: safetensors weights of the model that the adapter was trained on.
        adapter_folder: a LoRA or DoRA adapter as PEFT saves it.
        output: a new folder; nothing is left there if the merge is refused.
        prompts: texts on which merged model and adapter are compared.
        base: "original", or "nf4": adapted weights pass through 4-bit NormalFloat first, as in
            training on 4-bit weights. The comparison is with the adapter on that base.
        max_kl: mean KL in nats a token above which the merge is refused.

    Raises:
        ValueError: files that do not fit each other, an adapter of another kind, no prompts, a KL
            above `max_kl`.
    """
    if base not in BASES:
        raise ValueError(f"base must be one of {BASES}, got {base!r}")
    if not prompts:
        raise ValueError("prompts is empty: the merged model is compared on at least one text")
    weights, deltas = WeightFolder(base_folder), read_deltas(adapter_folder)
    check_known(deltas, weights, adapter_folder)

    def base_weight(name: str, tensor: Tensor) -> Tensor:
        if base == "nf4" and name in deltas:
            return nf4_dequantize(nf4_quantize(tensor), tensor.dtype)
        return tensor

    def merged(name: str, tensor: Tensor) -> Tensor:
        delta = deltas.get(name)
        return tensor if delta is None else merged_weight(name, base_weight(name, tensor), delta)

    with staged(output) as folder:
        write_like(weights, folder, merged)
        adapted = AutoModelForCausalLM.from_pretrained(base_folder)
        if base == "nf4":
            for name, parameter in adapted.named_parameters():
                parameter.data = base_weight(name, parameter.data)
        adapted = PeftModel.from_pretrained(adapted, str(adapter_folder))
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        before = log_probs(adapted, tokenizer, prompts)
        del adapted  # one model is in memory at a time
        after = log_probs(AutoModelForCausalLM.from_pretrained(folder), tokenizer, prompts)
        kls = token_kls(before, after)
        report = MergeReport(len(deltas), float(kls.mean()), float(kls.max()))
        if not report.mean_kl <= max_kl:
            raise ValueError(
                f"{report}: above {max_kl}. The weight's dtype loses the adapter: merge into a "
                "wider one, or keep the adapter beside the model"
            )
    return report


def check_known(
    deltas: dict[str, Delta], weights: WeightFolder, adapter_folder: str | Path
) -> None:
    """Raises ValueError if the adapter is of weights that the folder does not have."""
    unknown = sorted(set(deltas) - set(weights.shard_of))
    if unknown:
        raise ValueError(
            f"{adapter_folder} adapts {unknown[0]!r}, which {weights.folder} does not have: the "
            "adapter belongs to another model"
        )


def merged_weight(name: str, weight: Tensor, delta: Delta) -> Tensor:
    """W' [N, K] in the dtype of `weight`.

    Raises:
        ValueError: an adapter of another shape.
    """
    if weight.shape != (len(delta.b), delta.a.shape[1]):
        raise ValueError(
            f"{name} is {tuple(weight.shape)}, its adapter fits "
            f"{(len(delta.b), delta.a.shape[1])}: the adapter belongs to another model"
        )
    wide = weight.float() + delta.scale * (delta.b @ delta.a)
    if delta.magnitude is not None:
        norm = dora_weight_norm(weight.float(), delta.a, delta.b, delta.scale)
        wide *= (delta.magnitude / norm)[:, None]
    return wide.to(weight.dtype)


def read_deltas(folder: str | Path) -> dict[str, Delta]:
    """Name of the base weight -> its adapter in float32.

    Raises:
        ValueError: not a plain LoRA or DoRA adapter of linear layers.
    """
    config: Any = LoraConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} is not a LoRA adapter but {type(config).__name__}")
    for field in ("fan_in_fan_out", "lora_bias", "alora_invocation_tokens", "layer_replication"):
        if getattr(config, field, None):
            raise ValueError(f"{folder}: {field} is not merged here; use PEFT's merge_and_unload")
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    deltas: dict[str, Delta] = {}
    used: set[str] = set()
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removesuffix(".lora_A.weight")
        keys = [key, f"{layer}.lora_B.weight", f"{layer}.lora_magnitude_vector"]
        a, b = (tensors[k].float() for k in keys[:2])
        magnitude = tensors.get(keys[2])
        name = layer.removeprefix(_PREFIX)
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha
        )
        scale = alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))
        deltas[f"{name}.weight"] = Delta(
            a, b, scale, None if magnitude is None else magnitude.float()
        )
        used.update(k for k in keys if k in tensors)
    left = sorted(set(tensors) - used)
    if left or not deltas:
        raise ValueError(
            f"{folder} holds {left[0] if left else 'no adapter of a linear layer'!r}: only LoRA "
            "and DoRA of linear layers are merged here; use PEFT's merge_and_unload"
        )
    return deltas


@torch.no_grad()
def log_probs(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[Tensor]:
    """[tokens, V] of each prompt."""
    batches = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    return [model(ids).logits.float().log_softmax(-1)[0] for ids in batches]


def token_kls(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """KL of `after` from `before` at every token of all prompts, [tokens], nats."""
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)])
