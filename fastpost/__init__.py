"""fastpost: a post-training engine beneath the Hugging Face trainers.

Names are imported on first use, so that `import fastpost` needs neither transformers nor trl.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpost.packing import PackPlan as PackPlan
    from fastpost.packing import pack as pack
    from fastpost.scoring import accelerate_model as accelerate_model
    from fastpost.trainers.dpo import DPOConfig as DPOConfig
    from fastpost.trainers.dpo import DPOTrainer as DPOTrainer
    from fastpost.trainers.sft import SFTConfig as SFTConfig
    from fastpost.trainers.sft import SFTTrainer as SFTTrainer

__version__ = "0.1.0"

_HOME = {
    "DPOConfig": "fastpost.trainers.dpo",
    "DPOTrainer": "fastpost.trainers.dpo",
    "PackPlan": "fastpost.packing",
    "SFTConfig": "fastpost.trainers.sft",
    "SFTTrainer": "fastpost.trainers.sft",
    "accelerate_model": "fastpost.scoring",
    "pack": "fastpost.packing",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "PackPlan",
    "SFTConfig",
    "SFTTrainer",
    "accelerate_model",
    "pack",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fastpost' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
