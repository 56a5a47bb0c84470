"""SmolLM2 with an adapter, as PEFT builds it, on 16-bit weights or bitsandbytes' 4-bit ones."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fastpost.demo.smollm2 import smollm2_path

__all__ = ["KINDS", "build"]

KINDS = ("lora", "dora", "qlora", "qdora")
RANK = 32


def build(kind: str, rank: int = RANK) -> Any:
    """One of KINDS: all linear layers, adapters in float32 beside a bfloat16 base."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.bfloat16)
    if kind.startswith("q"):
        quantise(model)
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        use_dora=kind.endswith("dora"),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # an adapter that has learnt something, so that all gradients count
            nn.init.normal_(parameter, std=1e-3)
    return model.train()


def quantise(model: nn.Module) -> None:
    """Linear layers below the head become bitsandbytes' NF4 layers, double quantisation on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes as bnb
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or name == "lm_head":
                continue
            layer = bnb.nn.Linear4bit(
                child.in_features, child.out_features, child.bias is not None, torch.bfloat16
            )
            layer.weight = bnb.nn.Params4bit(
                child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to("cpu")
            # Its inference kernel repacks weights, after which training raises.
            layer.support_avx512bf16_for_cpu = False
            setattr(parent, name, layer)
