"""A planned configuration as the recipe of a training command."""

from __future__ import annotations

import json
from typing import Any

from fastpost.planning.report import settings, verdict
from fastpost.planning.request import Request
from fastpost.planning.roofline import Prediction
from fastpost.planning.trace import Traced

__all__ = ["command_of", "recipe_fields", "recipe_text"]


def command_of(request: Request) -> str:
    """The training command that runs this method: `fastpost COMMAND --config FILE`."""
    return "cpo" if request.method == "simpo" else request.method


def recipe_fields(request: Request) -> dict[str, Any]:
    """Fields of the method's command; what it trains on is left to the command line.

    Raises:
        ValueError: completions at once that are no multiple of a group, which trainers refuse.
    """
    adapter = request.adapter
    fields: dict[str, Any] = {
        "model": request.model,
        "dtype": "float32" if request.has_wide_weights else "bfloat16",
        "bf16": request.precision == "mixed",
        "per_device_train_batch_size": request.rows,
        "gradient_accumulation_steps": request.accumulation,
        "gradient_checkpointing": request.checkpointing,
    }
    if request.offload:
        fields["activation_checkpointing_kwargs"] = {"offload": True}
    if request.optimizer == "adamw_8bit":
        fields["optimizer"] = "adamw_8bit"
    else:
        fields["optim"] = "adamw_torch_fused"
    if request.optimizer_in_backward:
        fields |= {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    fields |= _method_fields(request)
    if adapter is not None:
        fields |= {"lora_r": adapter.rank, "use_dora": adapter.kind == "dora"}
        if adapter.kind == "qlora":
            fields["load_in_4bit"] = True
    if request.memory_budget_gb is not None:
        fields["memory_budget_gb"] = request.memory_budget_gb
    if request.mlp_tile_tokens is not None:
        fields["mlp_tile_tokens"] = request.mlp_tile_tokens
    if request.num_gpus > 1:
        fields |= {
            "fsdp": "full_shard",
            "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
        }
    return fields


def _method_fields(request: Request) -> dict[str, Any]:
    if request.samples:
        at_once = request.rows * request.num_gpus * request.accumulation
        if at_once % request.group:
            raise ValueError(
                f"{at_once} completions of a step ({request.rows} rows, {request.num_gpus} GPUs, "
                f"{request.accumulation} batches) are no multiple of the group of {request.group}: "
                "change rows, tokens_per_step or group"
            )
        fields: dict[str, Any] = {
            "num_generations": request.group,
            "max_completion_length": request.seq - request.num_prompt,
        }
        if request.beta is not None:
            fields["beta"] = request.beta
        if request.rollout_dtype is not None:
            fields["rollout_dtype"] = request.rollout_dtype
        return fields
    fields = {"max_length": request.seq}
    if request.method == "sft":
        fields["packing"] = True
    if request.method == "simpo":
        fields |= {"loss_type": "simpo", "cpo_alpha": 0.0}
    return fields


def recipe_text(traced: Traced, predicted: Prediction) -> str:
    """The recipe as YAML, with what was predicted of it as comments."""
    lines = [
        f"# fastpost {command_of(traced.request)} --config THIS_FILE --dataset ... "
        "--output_dir ...",
        f"# planned: {settings(traced)}",
        f"# {verdict(traced)}",
        f"# predicted {predicted.step:.2f} s a step, {predicted.tokens_per_second:,.0f} tokens/s",
    ]
    lines += [f"{name}: {json.dumps(v)}" for name, v in recipe_fields(traced.request).items()]
    return "\n".join(lines) + "\n"
