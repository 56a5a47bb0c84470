"""Train a reward model on what a language model replies when it is asked to sort, on a CPU.

    python examples/ranking_reward_model.py --output reward-model

`reward_model.py` beside this file tells sorted lists from wrongly sorted ones and has seen nothing
else, so its score of any other reply is arbitrary. Before a language model can sort it writes other
numbers, and words. Here the answers to a problem are ranked from best to worst: the sorted list,
the same numbers in another order, other numbers, words. The score then rises with every step
towards the sorted list, which is what a policy can learn from (`ppo_reward_model.py`). Each two
answers of a problem are a pair, next to each other in the data: in a batch they share prompt and
answers, so that six pairs cost four answers.

The prompt is the policy's, an example in it. No held-out problem is ever trained on.
"""

from __future__ import annotations

import argparse
import random
import time
from itertools import combinations
from typing import Any

import reward_model as sorting
from datasets import Dataset

# What a model is shown before the question, so that its first samples look like answers at all.
INTRODUCTION = [
    {"role": "system", "content": sorting.SYSTEM_PROMPT},
    {"role": "user", "content": "Sort in ascending order: 31, 8, 77"},
    {"role": "assistant", "content": "8, 31, 77"},
]
RANKS = ("right", "order", "numbers", "words")  # from best to worst
ALL_PAIRS = tuple(combinations(RANKS, 2))
# Replies in words. They are cut off anywhere behind the second word, as long samples are.
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
    """Problems of three or four numbers: a model of this size has a chance at them."""
    return sorting.problems(count, seed, held_out=held_out, max_numbers=4)


def prompt(entry: dict[str, Any]) -> list[dict[str, str]]:
    return [*INTRODUCTION, sorting.question(entry)]


def answers(entry: dict[str, Any], source: random.Random) -> dict[str, str]:
    """One answer of each of the `RANKS`."""
    right = sorting.numbers(entry, "sorted")
    return {
        "right": sorting.shown(right),
        "order": sorting.shown(sorting.in_other_order(right, source)),
        "numbers": sorting.shown(_other_numbers(right, source)),
        "words": _in_words(right, source),
    }


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
    text = source.choice(WORDS).format(numbers=sorting.shown(listed))
    words = text.split(" ")
    first = len(listed) + 2 if text.startswith(sorting.shown(listed)) else 2
    return " ".join(words[: source.randint(first, len(words))])


def pairs(count: int, seed: int, ranks: tuple[tuple[str, str], ...], *, held_out: bool) -> Dataset:
    """Pairs of the answers to `count` problems, the better rank first."""
    source = random.Random(seed)
    rows = []
    for entry in problems(count, seed, held_out=held_out):
        answer = answers(entry, source)
        rows += [
            {
                "prompt": prompt(entry),
                "chosen": [{"role": "assistant", "content": answer[better]}],
                "rejected": [{"role": "assistant", "content": answer[worse]}],
            }
            for better, worse in ranks
        ]
    return Dataset.from_list(rows)


def train(
    output: str, *, num_problems: int = 240, num_held_out: int = 100, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Train and save.

    Returns:
        Before and after: the share of held-out problems whose right answer is ranked above the one
        of each other rank.
    """
    return sorting.fit(
        output,
        pairs(num_problems, seed + 1, ALL_PAIRS, held_out=False),
        {
            rank: pairs(num_held_out, seed + 2, ((RANKS[0], rank),), held_out=True)
            for rank in RANKS[1:]
        },
        pairs_per_step=4 * len(ALL_PAIRS),
        # Scores of a problem's answers lie around 0: a policy is then paid for its answer and not
        # for the problem it got.
        centring=0.05,
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to save the reward model in")
    parser.add_argument("--problems", type=int, default=240, help="problems to train on")
    parser.add_argument("--held-out", type=int, default=100, help="problems to measure on")
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
            f"held-out, sorted list ranked over '{rank}': "
            f"{before[rank]:.1%} before, {after[rank]:.1%} after"
        )
    print(f"{minutes:.1f} min")


if __name__ == "__main__":
    main()
