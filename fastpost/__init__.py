"""fastpost: a post-training engine beneath the Hugging Face trainers.

Names are imported on first use, so that `import fastpost` needs neither transformers nor trl.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpost.adapters.load_nf4 import load_nf4 as load_nf4
    from fastpost.packing import PackPlan as PackPlan
    from fastpost.packing import pack as pack
    from fastpost.scoring import accelerate_model as accelerate_model
    from fastpost.trainers.cpo import CPOConfig as CPOConfig
    from fastpost.trainers.cpo import CPOTrainer as CPOTrainer
    from fastpost.trainers.dpo import DPOConfig as DPOConfig
    from fastpost.trainers.dpo import DPOTrainer as DPOTrainer
    from fastpost.trainers.grpo import GRPOConfig as GRPOConfig
    from fastpost.trainers.grpo import GRPOTrainer as GRPOTrainer
    from fastpost.trainers.kto import KTOConfig as KTOConfig
    from fastpost.trainers.kto import KTOTrainer as KTOTrainer
    from fastpost.trainers.online_dpo import OnlineDPOConfig as OnlineDPOConfig
    from fastpost.trainers.online_dpo import OnlineDPOTrainer as OnlineDPOTrainer
    from fastpost.trainers.orpo import ORPOConfig as ORPOConfig
    from fastpost.trainers.orpo import ORPOTrainer as ORPOTrainer
    from fastpost.trainers.ppo import PPOConfig as PPOConfig
    from fastpost.trainers.ppo import PPOTrainer as PPOTrainer
    from fastpost.trainers.prm import PRMConfig as PRMConfig
    from fastpost.trainers.prm import PRMTrainer as PRMTrainer
    from fastpost.trainers.reward import RewardConfig as RewardConfig
    from fastpost.trainers.reward import RewardTrainer as RewardTrainer
    from fastpost.trainers.rloo import RLOOConfig as RLOOConfig
    from fastpost.trainers.rloo import RLOOTrainer as RLOOTrainer
    from fastpost.trainers.sft import SFTConfig as SFTConfig
    from fastpost.trainers.sft import SFTTrainer as SFTTrainer

__version__ = "0.1.0"

_HOME = {
    "CPOConfig": "fastpost.trainers.cpo",
    "CPOTrainer": "fastpost.trainers.cpo",
    "DPOConfig": "fastpost.trainers.dpo",
    "DPOTrainer": "fastpost.trainers.dpo",
    "GRPOConfig": "fastpost.trainers.grpo",
    "GRPOTrainer": "fastpost.trainers.grpo",
    "KTOConfig": "fastpost.trainers.kto",
    "KTOTrainer": "fastpost.trainers.kto",
    "ORPOConfig": "fastpost.trainers.orpo",
    "ORPOTrainer": "fastpost.trainers.orpo",
    "OnlineDPOConfig": "fastpost.trainers.online_dpo",
    "OnlineDPOTrainer": "fastpost.trainers.online_dpo",
    "PPOConfig": "fastpost.trainers.ppo",
    "PPOTrainer": "fastpost.trainers.ppo",
    "PRMConfig": "fastpost.trainers.prm",
    "PRMTrainer": "fastpost.trainers.prm",
    "PackPlan": "fastpost.packing",
    "RLOOConfig": "fastpost.trainers.rloo",
    "RLOOTrainer": "fastpost.trainers.rloo",
    "RewardConfig": "fastpost.trainers.reward",
    "RewardTrainer": "fastpost.trainers.reward",
    "SFTConfig": "fastpost.trainers.sft",
    "SFTTrainer": "fastpost.trainers.sft",
    "accelerate_model": "fastpost.scoring",
    "load_nf4": "fastpost.adapters.load_nf4",
    "pack": "fastpost.packing",
}

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PRMConfig",
    "PRMTrainer",
    "PackPlan",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "accelerate_model",
    "load_nf4",
    "pack",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fastpost' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
