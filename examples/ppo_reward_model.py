"""Raise the score of a reward model with PPO, on a laptop's CPU.

    python examples/ppo_reward_model.py

A reward model learns to rank the replies of a model that is asked to sort numbers
(`ranking_reward_model.py` beside this file); then SmolLM2-135M, with a LoRA adapter and a value
head on its hidden states, learns to please it. Pass `--reward-model DIR` to use one that is there.
Two plain measures are taken too and never trained on, whether a reply is the sorted list and
whether it has the right numbers in any order: they say whether the reward model is pleased for the
right reason. All are means over sampled answers to held-out problems, which neither model was
trained on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import ranking_reward_model as ranking
import reward_model as sorting
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpost import PPOConfig, PPOTrainer
from fastpost.demo.smollm2 import smollm2_path


def prompts(count: int, seed: int, *, held_out: bool) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": ranking.prompt(entry), "answer": sorting.numbers(entry, "sorted")}
            for entry in ranking.problems(count, seed, held_out=held_out)
        ]
    )


def is_right(completions: list[Any], answer: list[list[int]], **_: Any) -> list[float]:
    """The task's own score: 1 where the reply is the sorted list."""
    return [float(_reply(c) == sorting.shown(a)) for c, a in zip(completions, answer, strict=True)]


def has_the_numbers(completions: list[Any], answer: list[list[int]], **_: Any) -> list[float]:
    """1 where the reply is a list of the right numbers, in any order."""
    return [
        float(sorted(_reply(c).split(", ")) == sorted(map(str, a)))
        for c, a in zip(completions, answer, strict=True)
    ]


def _reply(completion: list[dict[str, str]]) -> str:
    return completion[0]["content"].strip()


def train(
    reward_model: str, output: str, *, rollouts: int = 12, num_held_out: int = 96, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Train, and return the figures of the held-out problems before and after."""
    torch.manual_seed(seed)
    folder = smollm2_path()
    trainer = PPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=[reward_model, is_right, has_the_numbers],
        args=PPOConfig(
            output,
            reward_weights=[1.0, 0.0, 0.0],  # the last two are only looked at
            # A rollout: 4 answers to each of 12 problems, learnt from in 2 passes of 2 steps. Many
            # problems, because a score says a lot about its problem before the critic knows it.
            num_generations=4,
            per_device_train_batch_size=24,
            num_mini_batches=2,
            num_ppo_epochs=2,
            max_steps=4 * rollouts,
            max_completion_length=16,
            learning_rate=2e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=4,
            adam_beta2=0.95,
            # A score comes at the end of some 15 tokens, and those of a rollout are units apart: no
            # discount, and no narrow clip around a critic that has much to learn.
            lam=1.0,
            cliprange_value=10.0,
            kl_coef=0.05,
            vf_coef=0.1,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=4,
            per_device_eval_batch_size=64,
            save_strategy="no",
            report_to=[],
            seed=seed,
        ),
        train_dataset=prompts(12 * rollouts, seed + 3, held_out=False),
        eval_dataset=prompts(num_held_out, seed + 4, held_out=True),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(output)
    print(trainer.engine.report())
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reward-model", help="folder of a reward model; trained if left out")
    parser.add_argument("--output", help="folder to save adapter and value head in")
    parser.add_argument("--rollouts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        reward_model = options.reward_model
        if reward_model is None:
            reward_model = f"{scratch}/reward-model"
            ranking.train(reward_model, num_problems=160, num_held_out=50, seed=options.seed)
        before, after = train(
            reward_model,
            options.output or f"{scratch}/policy",
            rollouts=options.rollouts,
            seed=options.seed,
        )
    minutes = (time.monotonic() - started) / 60
    for name, key in (
        ("reward model", "eval_reward"),
        ("sorted lists", "eval_rewards/is_right/mean"),
        ("lists of the right numbers", "eval_rewards/has_the_numbers/mean"),
    ):
        print(f"{name}: {before[key]:.2f} before, {after[key]:.2f} after")
    print(f"{minutes:.1f} min")


if __name__ == "__main__":
    main()
