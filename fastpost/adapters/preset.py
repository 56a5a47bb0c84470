"""Best practice for an adapter as one configuration: DoRA on every linear layer, with LoRA+.

Sources: all linear layers, Dettmers et al., "QLoRA" (arXiv:2305.14314), section 4; DoRA, Liu et al.
(arXiv:2402.09353); LoRA+, Hayou et al. (arXiv:2402.12354).
"""

from __future__ import annotations

import logging
from typing import Any

from peft import LoraConfig

__all__ = ["BEST_LORA_PLUS_RATIO", "best_adapter", "preset_argument"]

logger = logging.getLogger("fastpost")

BEST_LORA_PLUS_RATIO = 16.0


def best_adapter(**changes: Any) -> LoraConfig:
    """`LoraConfig` of DoRA with rank 32, alpha 64 and dropout 0.05 on all linear layers.

    Pass it as a trainer's `peft_config`, with `lora_plus_ratio=BEST_LORA_PLUS_RATIO` in its
    configuration. `changes` are fields of `LoraConfig` that replace these.

    Raises:
        TypeError: a name that `LoraConfig` does not have.
    """
    fields: dict[str, Any] = {
        "r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "use_dora": True,
    }
    return LoraConfig(**(fields | changes))


def preset_argument(
    args: Any, arguments: dict[str, Any], task_type: str = "CAUSAL_LM"
) -> dict[str, Any]:
    """`peft_config` of the preset that `args.adapter` names, to add to a trainer's arguments.

    The preset is logged in full. `args.lora_plus_ratio` is set where it was left open.

    Args:
        args: a configuration with `adapter` and `lora_plus_ratio`.
        arguments: of the trainer's constructor.
        task_type: PEFT's name for what is trained.

    Raises:
        ValueError: an unknown preset, or a `peft_config` beside it.
    """
    if args.adapter is None:
        return {}
    if args.adapter != "best":
        raise ValueError(f"adapter must be 'best' or None, got {args.adapter!r}")
    if arguments.get("peft_config") is not None:
        raise ValueError(
            "adapter='best' is a peft_config of its own, and another was given; keep one. "
            "To change fields of the preset pass peft_config=fastpost.adapters.best_adapter(r=...)"
        )
    config = best_adapter(task_type=task_type)
    if args.lora_plus_ratio is None:
        args.lora_plus_ratio = BEST_LORA_PLUS_RATIO
    logger.warning(
        "adapter 'best': DoRA r %d, alpha %d, dropout %s on %s, LoRA+ ratio %g; all fields: %s",
        config.r,
        config.lora_alpha,
        config.lora_dropout,
        config.target_modules,
        args.lora_plus_ratio,
        {name: value for name, value in config.to_dict().items() if value is not None},
    )
    return {"peft_config": config}
