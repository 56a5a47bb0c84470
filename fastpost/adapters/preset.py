"""Best practice for an adapter as one configuration: DoRA on every linear layer, with LoRA+.

Sources: all linear layers, Dettmers et al., "QLoRA" (arXiv:2305.14314), section 4; DoRA, Liu et al.
(arXiv:2402.09353); LoRA+, Hayou et al. (arXiv:2402.12354).
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

__all__ = ["BEST_LORA_PLUS_RATIO", "best_adapter"]

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
