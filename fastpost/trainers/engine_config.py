"""What every configuration of ours has beside the fields of its method."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from fastpost.checkpointed_layers import refuse_unused
from fastpost.guards.options import refuse_options
from fastpost.optimizer_in_backward import refuse_fields


@dataclass
class EngineConfig:
    """Fields of the engine, mixed into each method's configuration.

    Attributes:
        prefix_sharing: compute equal beginnings of rows once.
        memory_budget_gb: workspace of the language-model head in GiB, None for the default.
        adapter: "best" trains DoRA with LoRA+ on all linear layers (`fastpost.adapters.preset`).
        lora_plus_ratio: learning rate of LoRA's matrices B over that of everything else (LoRA+).
        optimizer: "adamw_8bit" is AdamW with 8-bit states and, for bf16 weights, stochastic
            rounding (`fastpost_kernels.AdamW8bit`); None takes `optim`.
        optimizer_in_backward: update each layer as soon as its gradients are there, and free them
            (`fastpost.optimizer_in_backward`).
        mlp_tile_tokens: compute MLPs, and norms without a fused kernel, so many tokens at a time
            (`fastpost.tiled_mlp`). None: all at once.
        trial_step: before training, one real step on the worst batch, taken back bit for bit:
            predicted and measured peak memory are logged (`fastpost.trainers.trial_step`).
    """

    prefix_sharing: bool = field(
        default=True, metadata={"help": "Compute equal beginnings of rows once."}
    )
    memory_budget_gb: float | None = field(
        default=None,
        metadata={"help": "Workspace of the language-model head in GiB. None: kernel default."},
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "'best': DoRA of rank 32 on all linear layers, with LoRA+. None: none."},
    )
    lora_plus_ratio: float | None = field(
        default=None,
        metadata={"help": "LoRA+: learning rate of the matrices B over the others'; try 16."},
    )
    optimizer: str | None = field(
        default=None,
        metadata={"help": "'adamw_8bit': 8-bit states, stochastic rounding. None: optim's."},
    )
    optimizer_in_backward: bool = field(
        default=False,
        metadata={"help": "Update each layer in the backward, and free its gradients at once."},
    )
    mlp_tile_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of an MLP computed at a time, for long rows. None: all."},
    )
    trial_step: bool = field(
        default=False,
        metadata={"help": "Before training, measure the memory of a step on the worst batch."},
    )


def as_config(args: Any, config_class: type[Any]) -> Any:
    """`args` as our config. TRL's own and plain `TrainingArguments` gain the missing fields.

    Raises:
        TypeError: not training arguments.
    """
    if args is None:
        return config_class("trainer_output")
    if isinstance(args, config_class):
        return args
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args must be a {config_class.__name__}, got {type(args).__name__}")
    fields = [f.name for f in dataclasses.fields(args) if f.init]
    return config_class(**{name: getattr(args, name) for name in fields})


def refuse_unsupported(args: Any) -> None:
    """Refuse configurations the engine cannot honour.

    Raises:
        ValueError: names the option and what to use instead.
    """
    if args.memory_budget_gb is not None and not args.memory_budget_gb > 0:
        raise ValueError(f"memory_budget_gb must be positive, got {args.memory_budget_gb}")
    _refuse_optimizers(args)
    refuse_fields(args)
    refuse_unused(args)
    if args.deepspeed is not None:
        raise ValueError(
            "deepspeed is not supported: its partitioned parameters cannot be read by the fused "
            "head. Shard with FSDP2 (fsdp=...) instead"
        )
    refuse_options(args)


def _refuse_optimizers(args: Any) -> None:
    if args.optimizer is None:
        return
    if args.optimizer != "adamw_8bit":
        raise ValueError(
            f"optimizer must be 'adamw_8bit' or None, got {args.optimizer!r}; transformers' own "
            "optimizers are named by optim"
        )
    if args.optim != TrainingArguments.optim or args.optim_args is not None:
        raise ValueError(
            f"optimizer={args.optimizer!r} and optim={str(args.optim)!r} (optim_args="
            f"{args.optim_args!r}) name two optimizers; leave one of them out"
        )


__all__ = ["EngineConfig", "as_config", "refuse_unsupported"]
