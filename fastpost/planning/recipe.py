"""A planned configuration as the recipe of a training command."""

from __future__ import annotations

import json
from typing import Any

from fastpost.planning.report import settings, verdict
from fastpost.planning.request import Request
from fastpost.planning.roofline import Prediction
from fastpost.planning.trace import Traced

__all__ = ["recipe_fields", "recipe_text"]


def recipe_fields(request: Request) -> dict[str, Any]:
    """Fields of `fastpost sft`, `dpo` or `grpo`; what they train on is left to the command line.

    Raises:
        ValueError: a 4-bit model, which a recipe cannot ask for: it is loaded in Python.
    """
    adapter = request.adapter
    if adapter is not None and adapter.kind == "qlora":
        raise ValueError(
            "a recipe cannot load a model in 4 bits: pass load_nf4(...) to the trainer in Python, "
            "or plan --adapter lora"
        )
    is_wide = request.precision == "mixed" and adapter is None
    fields: dict[str, Any] = {
        "model": request.model,
        "dtype": "float32" if is_wide else "bfloat16",
        "bf16": request.precision == "mixed",
        "per_device_train_batch_size": request.rows,
        "gradient_accumulation_steps": request.accumulation,
        "gradient_checkpointing": request.checkpointing,
    }
    if request.optimizer == "adamw_8bit":
        fields["optimizer"] = "adamw_8bit"
    else:
        fields["optim"] = "adamw_torch_fused"
    if request.method == "grpo":
        fields["num_generations"] = request.group
        fields["max_completion_length"] = request.seq - int(request.seq * request.prompt)
    else:
        fields["max_length"] = request.seq
    if request.method == "sft":
        fields["packing"] = True
    if adapter is not None:
        fields |= {"lora_r": adapter.rank, "use_dora": adapter.kind == "dora"}
    if request.memory_budget_gb is not None:
        fields["memory_budget_gb"] = request.memory_budget_gb
    if request.num_gpus > 1:
        fields |= {
            "fsdp": "full_shard",
            "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
        }
    return fields


def recipe_text(traced: Traced, predicted: Prediction) -> str:
    """The recipe as YAML, with what was predicted of it as comments."""
    lines = [
        f"# planned: {settings(traced)}",
        f"# {verdict(traced)}",
        f"# predicted {predicted.step:.2f} s a step, {predicted.tokens_per_second:,.0f} tokens/s",
    ]
    lines += [f"{name}: {json.dumps(v)}" for name, v in recipe_fields(traced.request).items()]
    return "\n".join(lines) + "\n"
