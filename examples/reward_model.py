"""Train a reward model that tells sorted lists of numbers from wrongly sorted ones, on a CPU.

    python examples/reward_model.py --output reward-model

SmolLM2-135M gets a reward head and learns from pairs: a problem of reasoning-gym's `number_sorting`
with its answer, and with one in another order. Each problem comes with several wrong answers, next
to each other in the data: in a batch they share their prompt and the right answer, so that three
more pairs of a problem cost little more than their wrong answers.

No held-out problem is ever trained on: a checksum of its numbers puts it on one side or the other.
The saved folder loads with `AutoModelForSequenceClassification` and serves as `reward_funcs` of
GRPO and RLOO, or as the reward model of PPO. It has seen lists of the right numbers only: for a
policy that writes other things too there is `ranking_reward_model.py`.
"""

from __future__ import annotations

import argparse
import random
import time
import zlib
from typing import Any

import reasoning_gym
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpost import RewardConfig, RewardTrainer
from fastpost.demo.smollm2 import smollm2_path

SYSTEM_PROMPT = "You are careful with numbers."
WRONG_ANSWERS = 4  # of each problem


def problems(
    count: int, seed: int, *, held_out: bool, max_numbers: int = 5
) -> list[dict[str, Any]]:
    """`count` problems of three to `max_numbers` numbers from 0 to 99, all of one side."""
    source = reasoning_gym.create_dataset(
        "number_sorting",
        seed=seed,
        size=8 * count,
        min_numbers=3,
        max_numbers=max_numbers,
        max_decimals=0,
        min_value=0,
        max_value=99,
    )
    # The sorted numbers, so that a problem and its permutations are on the same side.
    sides = ((zlib.crc32(str(sorted(numbers(e, "sorted"))).encode()) % 4 == 0, e) for e in source)
    found = [
        entry
        for is_held_out, entry in sides
        # Equal numbers alone have no wrong order.
        if is_held_out == held_out and len(set(numbers(entry, "sorted"))) > 1
    ]
    return found[:count]


def numbers(entry: dict[str, Any], which: str) -> list[int]:
    """The "original" or the "sorted" numbers of a problem."""
    return [round(float(number)) for number in entry["metadata"][f"{which}_numbers"]]


def pair(entry: dict[str, Any], source: random.Random) -> dict[str, list[dict[str, str]]]:
    """The right answer and a wrong one: two numbers swapped half of the time, else all shuffled."""
    right = numbers(entry, "sorted")
    wrong = in_other_order(right, source)
    return {
        "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, question(entry)],
        "chosen": [{"role": "assistant", "content": shown(right)}],
        "rejected": [{"role": "assistant", "content": shown(wrong)}],
    }


def question(entry: dict[str, Any]) -> dict[str, str]:
    original = shown(numbers(entry, "original"))
    content = f"Sort in {entry['metadata']['direction']} order: {original}"
    return {"role": "user", "content": content}


def in_other_order(right: list[int], source: random.Random) -> list[int]:
    """Two numbers swapped half of the time, else all shuffled."""
    wrong = list(right)
    while wrong == right:
        if source.random() < 0.5:
            i, j = source.sample(range(len(wrong)), 2)
            wrong[i], wrong[j] = wrong[j], wrong[i]
        else:
            source.shuffle(wrong)
    return wrong


def shown(values: list[int]) -> str:
    return ", ".join(map(str, values))


def pairs(count: int, seed: int, *, held_out: bool, wrong_answers: int) -> Dataset:
    """Pairs of `count` problems, those of one problem next to each other."""
    source = random.Random(seed)
    entries = problems(count, seed, held_out=held_out)
    return Dataset.from_list([pair(e, source) for e in entries for _ in range(wrong_answers)])


def train(
    output: str, *, num_problems: int = 480, num_held_out: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Train and save; the share of held-out pairs ranked right, before and after."""
    before, after = fit(
        output,
        pairs(num_problems, seed + 1, held_out=False, wrong_answers=WRONG_ANSWERS),
        {"order": pairs(num_held_out, seed + 2, held_out=True, wrong_answers=1)},
        pairs_per_step=8 * WRONG_ANSWERS,
        centring=0.01,
        seed=seed,
    )
    return before["order"], after["order"]


def fit(
    output: str,
    rows: Dataset,
    held_out: dict[str, Dataset],
    *,
    pairs_per_step: int,
    centring: float,
    seed: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Train on pairs and save; the share ranked right of each held-out set, before and after."""
    torch.manual_seed(seed)  # the new head is drawn
    folder = smollm2_path()
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32
        ),
        args=RewardConfig(
            output,
            num_train_epochs=1,
            per_device_train_batch_size=pairs_per_step,
            per_device_eval_batch_size=50,
            train_sampling_strategy="sequential",
            learning_rate=5e-5,
            warmup_steps=5,
            center_rewards_coefficient=centring,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=True,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            seed=seed,
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )

    def accuracies() -> dict[str, float]:
        # One by one: TRL names the accuracy alike for every set.
        return {
            name: trainer.evaluate(prepared)["eval_accuracy"]
            for name, prepared in trainer.eval_dataset.items()
        }

    before = accuracies()
    trainer.train()
    after = accuracies()
    trainer.save_model(output)
    print(trainer.engine.report())
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to save the reward model in")
    parser.add_argument("--problems", type=int, default=480, help="problems to train on")
    parser.add_argument("--held-out", type=int, default=200, help="problems to measure on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    before, after = train(
        options.output,
        num_problems=options.problems,
        num_held_out=options.held_out,
        seed=options.seed,
    )
    minutes = (time.monotonic() - started) / 60
    print(
        f"held-out pairs ranked right: {before:.1%} before, {after:.1%} after ({minutes:.1f} min)"
    )


if __name__ == "__main__":
    main()
