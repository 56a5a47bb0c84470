"""What the planner says of a trainer's worst batch, or why it says nothing."""

from __future__ import annotations

import copy
from typing import Any

from peft import LoraConfig, PeftModel

from fastpost.adapters.nf4_layer import Nf4Linear
from fastpost.planning.apart import trace_apart
from fastpost.planning.composition import trace_composed
from fastpost.planning.request import Adapter, Request
from fastpost.planning.trace import Traced
from fastpost.trainers.trial_batch import Shape

__all__ = ["predicted_bytes"]

_FUSED = ("adamw_torch_fused",)
_PLANNED_OPTIONS = ("use_reentrant", "offload")


class _NotPlannedError(ValueError):
    """The planner has no such configuration."""


def predicted_bytes(trainer: Any, method: str, shape: Shape) -> tuple[int | None, str]:
    """Peak of one process in a step with that batch, sampling apart.

    Returns:
        bytes and "", or None and the reason why nothing is predicted.
    """
    config = copy.deepcopy(trainer.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    on_gpu = trainer.args.device.type != "cpu"
    is_distributed = trainer.accelerator.num_processes > 1
    try:
        request = _request(trainer, method, shape)
        run = trace_apart if is_distributed else trace_composed
        traced = run(request, config, on_gpu=on_gpu)
        _check_counts(trainer, traced)
    except (ValueError, RuntimeError) as reason:
        return None, str(reason)
    updates = (p for window, p in traced.windows.items() if "rollout" not in window.phase)
    return max(peak.total for peak in updates), ""


def _request(trainer: Any, method: str, shape: Shape) -> Request:
    args = trainer.args
    options = args.activation_checkpointing_kwargs or {}
    unknown = sorted(set(options) - set(_PLANNED_OPTIONS))
    if args.gradient_checkpointing and unknown:
        raise _NotPlannedError(f"activation_checkpointing_kwargs has {unknown}")
    if args.torch_compile:
        raise _NotPlannedError("torch_compile is set")
    rows = args.per_device_train_batch_size
    processes = trainer.accelerator.num_processes if trainer.is_fsdp_enabled else 1
    sampling: dict[str, Any] = {}
    if method in ("grpo", "rloo"):
        sampling = {"group": trainer.num_generations, "beta": trainer.beta}
        sampling["rollout_dtype"] = args.rollout_dtype
    at_once = processes * shape.seq * rows * (2 if method in ("dpo", "reward") else 1)
    return Request(
        model=trainer.model.config._name_or_path or type(trainer.model).__name__,
        method=method,
        num_gpus=processes,
        seq=shape.seq,
        rows=rows,
        # the planner takes the share of a row, and rounds it down
        prompt=(shape.prompt + 0.5) / shape.seq,
        tokens_per_step=at_once * args.gradient_accumulation_steps,
        adapter=_adapter(trainer.model),
        optimizer=_optimizer(args),
        optimizer_in_backward=args.optimizer_in_backward,
        precision=_precision(trainer),
        checkpointing=args.gradient_checkpointing,
        offload=bool(args.gradient_checkpointing and options.get("offload")),
        memory_budget_gb=args.memory_budget_gb,
        mlp_tile_tokens=args.mlp_tile_tokens,
        **sampling,
    )


def _adapter(model: Any) -> Adapter | None:
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[model.active_adapter]
    if len(model.peft_config) > 1 or type(config) is not LoraConfig:
        raise _NotPlannedError("the adapter is not one LoRA")
    is_packed = any(isinstance(module, Nf4Linear) for module in model.modules())
    if config.use_dora and is_packed:
        raise _NotPlannedError("DoRA on weights in 4 bits")
    kind = "qlora" if is_packed else "dora" if config.use_dora else "lora"
    return Adapter(kind, config.r)


def _optimizer(args: Any) -> str:
    if args.optimizer is not None:
        return str(args.optimizer)
    name = str(getattr(args.optim, "value", args.optim))
    if name not in _FUSED:
        raise _NotPlannedError(f"optim is {name}, planned are {', '.join(_FUSED)} and adamw_8bit")
    return "adamw"


def _precision(trainer: Any) -> str:
    mixed = trainer.accelerator.mixed_precision
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.dim() > 1}
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes} - {"uint8"}
    if mixed == "bf16":
        return "mixed"
    if mixed == "no" and names == {"float32"}:
        return "fp32"
    if mixed == "no" and "bfloat16" in names:
        return "bf16"
    raise _NotPlannedError(f"mixed precision {mixed} of weights in {', '.join(sorted(names))}")


def _check_counts(trainer: Any, traced: Traced) -> None:
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if trained != traced.num_trained:
        raise _NotPlannedError(
            f"the planner would train {traced.num_trained:,} parameters, this run trains "
            f"{trained:,}"
        )
