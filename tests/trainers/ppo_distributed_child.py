"""One process of a data-parallel PPO run: `python -m tests.trainers.ppo_distributed_child FOLDER`.

Started by `test_ppo_distributed` with the variables torchrun would set. Runs every case and leaves
losses and weights in FOLDER, one file per case and rank.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForTokenClassification

import fastpost
from fastpost.rollout.interface import Completions
from tests.trainers import methods

GLOBAL_ROWS = 8
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")

# Case -> config fields, constructor arguments.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "value-head": ({"kl_target": 0.05, "kl_horizon": 20, "whiten_rewards": True}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, {}),
    "lora": ({"entropy_coef": 0.02}, {"peft_config": LORA}),
    "value-model": ({}, {"value_model": LlamaForTokenClassification}),
}


class RolloutOfPrompt:
    """Completions that are a function of their prompt, of different lengths."""

    def generate(self, prompt_ids: list[list[int]]) -> Completions:
        return Completions(
            [
                [3 + (sum(ids) * (i + 7)) % 250 for i in range(1 + sum(ids) % 6)]
                for ids in prompt_ids
            ]
        )


def letter_sum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) % 11 / 5 for ids in completion_ids]


def run_case(case: str, folder: Path, num_processes: int) -> dict[str, Any]:
    """Losses and weights of four steps on the same rollouts of eight rows."""
    config, arguments = CASES[case]
    arguments = dict(arguments)
    if "value_model" in arguments:
        build = methods.classifier(arguments["value_model"], num_labels=1)
        arguments["value_model"] = build(hidden_size=32, seed=1)
    torch.manual_seed(0)  # a new adapter is drawn
    rows = GLOBAL_ROWS // num_processes // config.get("gradient_accumulation_steps", 1)
    trainer = fastpost.PPOTrainer(
        methods.causal_model(),
        letter_sum,
        fastpost.PPOConfig(
            str(folder / f"{case}-{num_processes}"),
            **{
                "per_device_train_batch_size": rows,
                "num_ppo_epochs": 2,
                "max_steps": 4,
                "optim": "sgd",
                "learning_rate": 0.02,
                "kl_coef": 0.1,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
            }
            | ({"ddp_backend": "gloo"} if num_processes > 1 else {})
            | config,
        ),
        Dataset.from_list([{"prompt": f"{i} and " * (1 + i % 3)} for i in range(20)]),
        processing_class=methods.tokenizer(),
        **arguments,
    )
    trainer.rollout = RolloutOfPrompt()
    trainer.train()
    trainer.engine.remove()
    return {
        "logs": [line for line in trainer.state.log_history if "loss" in line],
        "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
        "kl_coef": trainer.kl_controller.coefficient,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    for case in CASES:
        result = run_case(case, folder, int(os.environ["WORLD_SIZE"]))
        torch.save(result, folder / f"{case}-rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
