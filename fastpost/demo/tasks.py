"""Sums worked step by step: training rows, preference pairs and a fair exam.

The problems are reasoning-gym's `chain_sum` ("38 + 28 - 45 ="), which a 135M-parameter model fails
when it answers at once and can learn to solve one step per line. The scorer is the task's own.

Training and held-out problems are told apart by the problem itself: a checksum of the expression
puts a fixed quarter of all problems on the held-out side. No choice of seeds or sizes can make the
two overlap. (Seeds alone would not do: reasoning-gym seeds item i with seed + i.)

A rejected answer is a wrong one that the model itself gave, the chosen one the worked solution:
pairs differ where this model goes wrong, and share the steps that it gets right.
"""

import re
import zlib
from typing import Any, NamedTuple

import reasoning_gym
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SYSTEM_PROMPT = (
    "You are a careful calculator. Work from left to right, one short step per line, "
    "and end with a line 'Answer: ' and the number."
)
HELD_OUT_SHARE = 4  # one problem in four
# Items a seed may draw from before it would meet the next seed's.
ITEMS_PER_SEED = 1_000_000

Message = dict[str, str]


class Evaluation(NamedTuple):
    """What a model did in the exam.

    accuracy: share of the problems whose answer the task's scorer gives full marks.
    replies: the model's text, one per problem.
    """

    accuracy: float
    replies: list[str]


def sft_rows(n: int, seed: int, *, held_out: bool = False) -> list[dict[str, list[Message]]]:
    """`n` different problems with their worked solutions, as {"prompt", "completion"} messages."""
    return [
        {"prompt": _prompt(entry), "completion": _reply(solution(entry))}
        for entry in problems(n, seed, held_out=held_out)
    ]


def preference_rows(
    entries: list[dict[str, Any]], replies: list[str]
) -> list[dict[str, list[Message]]]:
    """{"prompt", "chosen", "rejected"} for every problem that a model's reply got wrong."""
    return [
        {
            "prompt": _prompt(entry),
            "chosen": _reply(solution(entry)),
            "rejected": _reply(reply),
        }
        for entry, reply in zip(entries, replies, strict=True)
        if reply.strip() and score(reply, entry) < 1.0
    ]


def problems(n: int, seed: int, *, held_out: bool) -> list[dict[str, Any]]:
    """`n` different reasoning-gym entries, all from the held-out side or all from the other.

    Raises:
        ValueError: if `n` is not between 1 and 100,000.
    """
    if not 1 <= n <= 100_000:
        raise ValueError(f"n must be between 1 and 100,000 problems, got {n}")
    dataset = _dataset(seed)
    entries: dict[str, dict[str, Any]] = {}
    for index in range(len(dataset)):
        entry = dataset[index]
        if is_held_out(entry) == held_out:
            entries.setdefault(entry["question"], entry)
        if len(entries) == n:
            break
    return list(entries.values())


def is_held_out(entry: dict[str, Any]) -> bool:
    """Whether the problem belongs to the side that is never trained on."""
    return zlib.crc32(entry["metadata"]["expression"].encode()) % HELD_OUT_SHARE == 0


def solution(entry: dict[str, Any]) -> str:
    """The worked solution: left-to-right steps, one per line, then the answer."""
    first, *rest = entry["metadata"]["expression"].split()
    value = int(first)
    lines = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = value + int(term) if sign == "+" else value - int(term)
        lines.append(f"{value} {sign} {term} = {result}")
        value = result
    return "\n".join([*lines, f"Answer: {value}"])


def score(reply: str, entry: dict[str, Any]) -> float:
    """The task's score, 0 to 1, of the last number in the reply.

    The last number, so that a model that has not learnt the format is marked for its arithmetic.
    """
    numbers = re.findall(r"-?\d+", reply.replace(",", ""))
    return _dataset(0).score_answer(numbers[-1] if numbers else None, entry)


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int, seed: int
) -> Evaluation:
    """Greedy answers to `n` held-out problems, scored."""
    entries = problems(n, seed, held_out=True)
    replies = answer(model, tokenizer, entries)
    marks = [score(reply, entry) for reply, entry in zip(replies, entries, strict=True)]
    return Evaluation(sum(mark == 1.0 for mark in marks) / n, replies)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    entries: list[dict[str, Any]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 64,
) -> list[str]:
    """Greedy replies to the problems, in their order.

    Args:
        batch_size: problems answered together, padded on the left.
        max_new_tokens: longest reply; the longest worked solution is below 60 tokens.
    """
    was_training = model.training
    model.eval()
    # Problems of one length together: less padding and no short reply waits for a long one.
    order = sorted(range(len(entries)), key=lambda i: len(entries[i]["question"]))
    replies = [""] * len(entries)
    for start in range(0, len(entries), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer.apply_chat_template(
            [_prompt(entries[i]) for i in batch],
            add_generation_prompt=True,
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(batch, texts, strict=True):
            replies[i] = text
    model.train(was_training)
    return replies


def _dataset(seed: int) -> Any:
    return reasoning_gym.create_dataset(
        "chain_sum",
        seed=seed * ITEMS_PER_SEED,
        size=ITEMS_PER_SEED,
        min_terms=3,
        max_terms=5,
        min_digits=1,
        max_digits=2,
    )


def _prompt(entry: dict[str, Any]) -> list[Message]:
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": entry["question"]},
    ]


def _reply(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


__all__ = [
    "Evaluation",
    "answer",
    "evaluate",
    "is_held_out",
    "preference_rows",
    "problems",
    "score",
    "sft_rows",
    "solution",
]
