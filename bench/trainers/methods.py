"""The methods that are measured: their trainers, configurations and data."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from bench.trainers.workload import maths_rows

GROUP = 8


@dataclass(frozen=True)
class Method:
    """One method of post-training, measured on a fixed number of sequences a step.

    Attributes:
        trainer: name of the trainer class, and of the config class, without their endings.
        trl_module: where TRL keeps them; None where TRL has no such trainer.
        unit: what a row of a batch is.
        columns: rows of a problem with its right and wrong answer -> rows of the data set.
        sequences_per_row: rows of tokens that one row of a batch becomes.
        config: fields beside those every method gets.
        needs_reward: whether the trainer takes reward functions.
    """

    trainer: str
    trl_module: str | None
    unit: str
    columns: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
    sequences_per_row: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    needs_reward: bool = False

    @property
    def peer(self) -> str:
        """What it is measured against: "trl", or our trainer on a padded forward."""
        return "padded" if self.trl_module is None else "trl"

    def classes(self, engine: str) -> tuple[type[Any], type[Any]]:
        """Trainer and config class of "ours" or "trl"."""
        home = "fastpost" if engine != "trl" else self.trl_module
        if home is None:
            raise SystemExit(f"TRL has no {self.trainer}Trainer")
        module = importlib.import_module(home)
        return getattr(module, f"{self.trainer}Trainer"), getattr(module, f"{self.trainer}Config")

    def dataset(self, num_rows: int, answers: str) -> Dataset:
        """Rows in the columns the method takes."""
        return Dataset.from_list(self.columns(maths_rows(num_rows, answers))[:num_rows])


def _pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


def _completions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def _unpaired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if i % 2 == 0 else "rejected"],
            "label": i % 2 == 0,
        }
        for i, row in enumerate(rows)
    ]


def _prompts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "solution": row["chosen"][0]["content"]} for row in rows]


_ONE_UPDATE_A_ROLLOUT = {"max_completion_length": 256, "num_generations": GROUP}

METHODS = {
    "sft": Method("SFT", "trl", "rows", _completions),
    "dpo": Method("DPO", "trl", "pairs", _pairs, sequences_per_row=2),
    "kto": Method("KTO", "trl", "answers", _unpaired),
    "orpo": Method("ORPO", "trl.experimental.orpo", "pairs", _pairs, sequences_per_row=2),
    "simpo": Method(
        "CPO",
        "trl.experimental.cpo",
        "pairs",
        _pairs,
        sequences_per_row=2,
        config={"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5},
    ),
    "reward": Method("Reward", "trl", "pairs", _pairs, sequences_per_row=2),
    "grpo": Method(
        "GRPO",
        "trl",
        "completions of 2 prompts",
        _prompts,
        config=_ONE_UPDATE_A_ROLLOUT | {"beta": 0.04},
        needs_reward=True,
    ),
    "rloo": Method(
        "RLOO",
        "trl",
        "completions of 2 prompts",
        _prompts,
        config=_ONE_UPDATE_A_ROLLOUT | {"beta": 0.04},
        needs_reward=True,
    ),
    "online_dpo": Method(
        "OnlineDPO",
        "trl.experimental.online_dpo",
        "prompts, 2 completions each",
        _prompts,
        sequences_per_row=2,
        config={"max_new_tokens": 256, "max_length": 1024},
        needs_reward=True,
    ),
    "ppo": Method(
        "PPO",
        None,
        "completions of 2 prompts",
        _prompts,
        config={"max_completion_length": 256, "num_generations": GROUP, "num_ppo_epochs": 1},
        needs_reward=True,
    ),
}

__all__ = ["GROUP", "METHODS", "Method"]
