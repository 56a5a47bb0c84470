"""Train a reward model that tells sorted lists of numbers from worse answers, on a CPU.

    python examples/reward_model.py --output reward-model

SmolLM2-135M gets a reward head and learns from the answers to problems of reasoning-gym's
`number_sorting`, ranked from best to worst: the sorted list, the same numbers in another order,
other numbers, other words. The last two are what a language model writes before it can sort, so
that the score means something there too and rises with every step towards the sorted list. Each two
answers of a problem are a pair, and the pairs of a problem stand next to each other in the data: in
a batch they share prompt and answers, so that six pairs cost four answers.

No held-out problem is ever trained on: a checksum of its numbers puts it on one side or the other.
The saved folder loads with `AutoModelForSequenceClassification` and serves as `reward_funcs` of
GRPO and RLOO, or as the reward model of PPO.
"""

from __future__ import annotations

import argparse
import random
import time
import zlib
from itertools import combinations
from typing import Any

import reasoning_gym
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpost import RewardConfig, RewardTrainer
from fastpost.demo.smollm2 import smollm2_path

# What a model is shown before the question, so that its first samples look like answers at all.
INTRODUCTION = [
    {"role": "system", "content": "You are careful with numbers."},
    {"role": "user", "content": "Sort in ascending order: 31, 8, 77"},
    {"role": "assistant", "content": "8, 31, 77"},
]
# Answers from best to worst, and two ways to take pairs from them: all, and the best against each.
RANKS = ("right", "order", "numbers", "words")
ALL_PAIRS = tuple(combinations(RANKS, 2))
BEST_PAIRS = tuple((RANKS[0], rank) for rank in RANKS[1:])
# Replies in words; they are cut off anywhere behind the second word, as long samples are.
WORDS = (
    "The numbers in sorted order are {numbers}.",
    "Here's the sorted list:\n{numbers}",
    "Here are the numbers, sorted: {numbers}",
    "Sorted list: {numbers}. I hope this helps you with the task!",
    "To sort the numbers, compare each one with the next and swap the two if needed.",
    "The list {numbers} is in the order that you asked for.",
    "The original list is {numbers}, and the first number of it is the smallest.",
    "The numbers {numbers} do not need to be moved, as they are sorted already.",
    "In this list every number comes before those that are larger.",
    "I removed the smallest number and put it in front of the rest of the list.",
    "You can use the function sorted() to put any list of numbers in order.",
    "{numbers}\n\nThe list is now in order, from the first number to the last.",
    "{numbers} are the sorted numbers, and the sum of them is another number.",
    "{numbers}. Each number of the list is larger than the one in front of it.",
)


def problems(count: int, seed: int, *, held_out: bool) -> list[dict[str, Any]]:
    """`count` problems of three or four numbers from 0 to 99, all of one side."""
    source = reasoning_gym.create_dataset(
        "number_sorting",
        seed=seed,
        size=8 * count,
        min_numbers=3,
        max_numbers=4,
        max_decimals=0,
        min_value=0,
        max_value=99,
    )
    # The sorted numbers, so that a problem and its permutations are on the same side.
    # Equal numbers alone have no wrong order.
    sides = ((zlib.crc32(str(sorted(numbers(e, "sorted"))).encode()) % 4 == 0, e) for e in source)
    found = [
        entry
        for is_held_out, entry in sides
        if is_held_out == held_out and len(set(numbers(entry, "sorted"))) > 1
    ]
    return found[:count]


def numbers(entry: dict[str, Any], which: str) -> list[int]:
    """The "original" or the "sorted" numbers of a problem."""
    return [round(float(number)) for number in entry["metadata"][f"{which}_numbers"]]


def question(entry: dict[str, Any]) -> list[dict[str, str]]:
    """The messages before the answer."""
    original = shown(numbers(entry, "original"))
    content = f"Sort in {entry['metadata']['direction']} order: {original}"
    return [*INTRODUCTION, {"role": "user", "content": content}]


def answers(entry: dict[str, Any], source: random.Random) -> dict[str, str]:
    """One answer of each of the `RANKS`."""
    right = numbers(entry, "sorted")
    return {
        "right": shown(right),
        "order": shown(_in_other_order(right, source)),
        "numbers": shown(_other_numbers(right, source)),
        "words": _in_words(right, source),
    }


def _in_other_order(right: list[int], source: random.Random) -> list[int]:
    """Two numbers swapped half of the time, else all shuffled."""
    wrong = list(right)
    while wrong == right:
        if source.random() < 0.5:
            i, j = source.sample(range(len(wrong)), 2)
            wrong[i], wrong[j] = wrong[j], wrong[i]
        else:
            source.shuffle(wrong)
    return wrong


def _other_numbers(right: list[int], source: random.Random) -> list[int]:
    """One number left out, written twice, replaced by another of the list or by any other."""
    wrong = list(right)
    if source.random() < 0.5:
        source.shuffle(wrong)
    place = source.randrange(len(wrong))
    match source.randrange(4):
        case 0:
            del wrong[place]
        case 1:
            wrong.insert(source.randrange(len(wrong) + 1), wrong[place])
        case 2:
            wrong[place] = source.choice([number for number in right if number != wrong[place]])
        case 3:
            wrong[place] = source.choice([number for number in range(100) if number not in right])
    return wrong


def _in_words(right: list[int], source: random.Random) -> str:
    listed = list(right)
    source.shuffle(listed)
    text = source.choice(WORDS).format(numbers=shown(listed))
    words = text.split(" ")
    first = len(listed) + 2 if text.startswith(shown(listed)) else 2
    return " ".join(words[: source.randint(first, len(words))])


def shown(values: list[int]) -> str:
    return ", ".join(map(str, values))


def pairs(
    count: int, seed: int, *, held_out: bool, ranks: tuple[tuple[str, str], ...] = ALL_PAIRS
) -> Dataset:
    """Pairs of `count` problems, those of one problem next to each other.

    Args:
        ranks: which answers to pair, the better one first.
    """
    source = random.Random(seed)
    rows = []
    for entry in problems(count, seed, held_out=held_out):
        answer = answers(entry, source)
        rows += [
            {
                "prompt": question(entry),
                "chosen": [{"role": "assistant", "content": answer[better]}],
                "rejected": [{"role": "assistant", "content": answer[worse]}],
            }
            for better, worse in ranks
        ]
    return Dataset.from_list(rows)


def train(
    output: str, *, num_problems: int = 320, num_held_out: int = 150, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Train and save.

    Returns:
        Before and after: the share of held-out problems whose right answer is ranked above the one
        of each other rank.
    """
    torch.manual_seed(seed)  # the new head is drawn
    folder = smollm2_path()
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32
        ),
        args=RewardConfig(
            output,
            num_train_epochs=1,
            per_device_train_batch_size=4 * len(ALL_PAIRS),
            per_device_eval_batch_size=50,
            train_sampling_strategy="sequential",
            learning_rate=5e-5,
            warmup_steps=5,
            # Scores of a problem's answers lie around 0: a policy is then paid for its answer and
            # not for the problem it got.
            center_rewards_coefficient=0.05,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=True,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            seed=seed,
        ),
        train_dataset=pairs(num_problems, seed + 1, held_out=False),
        eval_dataset={
            worse: pairs(num_held_out, seed + 2, held_out=True, ranks=((better, worse),))
            for better, worse in BEST_PAIRS
        },
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    before = _accuracies(trainer)
    trainer.train()
    after = _accuracies(trainer)
    trainer.save_model(output)
    print(trainer.engine.report())
    return before, after


def _accuracies(trainer: RewardTrainer) -> dict[str, float]:
    # One by one: TRL names the accuracy alike for every data set.
    return {
        rank: trainer.evaluate(rows)["eval_accuracy"] for rank, rows in trainer.eval_dataset.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to save the reward model in")
    parser.add_argument("--problems", type=int, default=320, help="problems to train on")
    parser.add_argument("--held-out", type=int, default=150, help="problems to measure on")
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
    for rank in before:
        print(
            f"held-out, right answer ranked over other {rank}: "
            f"{before[rank]:.1%} before, {after[rank]:.1%} after"
        )
    print(f"{minutes:.1f} min")


if __name__ == "__main__":
    main()
