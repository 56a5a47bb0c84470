"""Train a reward model that tells right sums from wrong ones, on a laptop's CPU.

    python examples/reward_model.py --output reward-model

SmolLM2-135M gets a reward head and learns from pairs: a problem of reasoning-gym with its answer
and with a wrong one. No held-out problem is ever trained on: a checksum of the problem itself puts
it on one side or the other. The saved folder loads with `AutoModelForSequenceClassification` and
serves as `reward_funcs` of GRPO and RLOO, or as the reward model of PPO.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import reasoning_gym
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpost import RewardConfig, RewardTrainer
from fastpost.demo.smollm2 import smollm2_path
from fastpost.demo.tasks import is_held_out

SYSTEM_PROMPT = "You are a careful calculator. Answer with the number alone."


def problems(count: int, seed: int, *, held_out: bool) -> list[dict[str, Any]]:
    """Different sums and differences of two numbers below 100, all of one side."""
    source = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=20_000, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    )
    found: dict[str, dict[str, Any]] = {}
    for entry in source:
        if is_held_out(entry) == held_out:
            found.setdefault(entry["metadata"]["expression"], entry)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"there are only {len(found)} such problems, {count} were asked for")


def pair(entry: dict[str, Any], source: random.Random) -> dict[str, list[dict[str, str]]]:
    """The right answer and a wrong one: a slip of the pen half of the time, else any number."""
    right = int(entry["answer"])
    slips = [right + slip for slip in (-10, -2, -1, 1, 2, 10)]
    others = [number for number in range(-99, 199) if number != right]
    wrong = source.choice(slips if source.random() < 0.5 else others)
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": entry["question"]},
        ],
        "chosen": [{"role": "assistant", "content": str(right)}],
        "rejected": [{"role": "assistant", "content": str(wrong)}],
    }


def pairs(count: int, seed: int, *, held_out: bool) -> Dataset:
    source = random.Random(seed)
    return Dataset.from_list(
        [pair(entry, source) for entry in problems(count, seed, held_out=held_out)]
    )


def train(
    output: str, *, num_pairs: int = 1600, num_held_out: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Train and save; the share of held-out pairs ranked right, before and after."""
    torch.manual_seed(seed)  # the new head is drawn
    folder = smollm2_path()
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32
        ),
        args=RewardConfig(
            output,
            num_train_epochs=1,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=50,
            learning_rate=5e-5,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            center_rewards_coefficient=0.01,
            gradient_checkpointing=False,
            bf16=True,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        ),
        train_dataset=pairs(num_pairs, seed + 1, held_out=False),
        eval_dataset=pairs(num_held_out, seed + 2, held_out=True),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(output)
    print(trainer.engine.report())
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to save the reward model in")
    parser.add_argument("--pairs", type=int, default=1600, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=200, help="pairs to measure on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    before, after = train(
        options.output,
        num_pairs=options.pairs,
        num_held_out=options.held_out,
        seed=options.seed,
    )
    minutes = (time.monotonic() - started) / 60
    print(
        f"held-out pairs ranked right: {before:.1%} before, {after:.1%} after ({minutes:.1f} min)"
    )


if __name__ == "__main__":
    main()
