"""The worst batch that a trainer can meet: as many rows as it takes, each as long as its longest.

Ids are drawn, so that rows share nothing but what the method makes them share; lengths are those of
the training data (a method that samples: its longest prompt, and `max_completion_length`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow.compute as pc
import torch
import trl

__all__ = ["TRIED", "Shape", "worst_inputs", "worst_shape"]

# Class of TRL -> the planner's name of the method.
TRIED = {
    trl.SFTTrainer: "sft",
    trl.DPOTrainer: "dpo",
    trl.RewardTrainer: "reward",
    trl.GRPOTrainer: "grpo",
    trl.RLOOTrainer: "rloo",
}
_FIRST = 3  # ids below stand for padding and ends of text in most vocabularies
_PROMPTS_TRIED = 64  # the longest in characters, of which the longest in tokens is taken


class Shape(NamedTuple):
    """Tokens of the longest row."""

    prompt: int
    answer: int

    @property
    def seq(self) -> int:
        return self.prompt + self.answer


def worst_shape(trainer: Any, method: str) -> Shape:
    """Of the longest row of `trainer.train_dataset`, as it is tokenised and cut."""
    data = trainer.train_dataset
    if method == "sft":
        return Shape(0, max(_lengths(data, "input_ids")))
    if method == "reward":
        return Shape(0, max(max(pair) for pair in zip(*_pair(data), strict=True)))
    if method == "dpo":
        rows = zip(_lengths(data, "prompt_ids"), *_pair(data), strict=True)
        found = [Shape(prompt, max(answers)) for prompt, *answers in rows]
        longest = max(found, key=lambda shape: shape.seq)
        most = trainer.data_collator.max_length or longest.seq
        prompt = min(longest.prompt, most - 1)
        return Shape(prompt, min(longest.seq, most) - prompt)
    return Shape(_longest_prompt(trainer), trainer.max_completion_length)


def worst_inputs(trainer: Any, method: str, shape: Shape) -> dict[str, Any]:
    """A batch of that shape as the method's `compute_loss` takes it, on the trainer's device."""
    rows = trainer.args.per_device_train_batch_size
    draw = _drawer(trainer)
    if method in ("grpo", "rloo"):
        return _sampled(trainer, method, shape, draw)
    features = [_feature(method, shape, draw) for _ in range(rows)]
    if method == "sft":
        for feature in features:
            feature["seq_lengths"] = [shape.seq]
    if method == "dpo" and trainer.precompute_ref_logps:
        for feature in features:
            feature |= {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
    # not the trainer's own `_prepare_inputs`, which may sample
    return {
        name: value.to(trainer.args.device) if isinstance(value, torch.Tensor) else value
        for name, value in trainer.data_collator(features).items()
    }


def _feature(method: str, shape: Shape, draw: Callable[[int], list[int]]) -> dict[str, Any]:
    if method == "sft":
        return {"input_ids": draw(shape.seq)}
    if method == "reward":
        return {"chosen_ids": draw(shape.seq), "rejected_ids": draw(shape.seq)}
    return {
        "prompt_ids": draw(shape.prompt),
        "chosen_ids": draw(shape.answer),
        "rejected_ids": draw(shape.answer),
    }


def _sampled(
    trainer: Any, method: str, shape: Shape, draw: Callable[[int], list[int]]
) -> dict[str, Any]:
    """What `_generate_and_score_completions` gives: completions of a group share their prompt."""
    rows, group = trainer.args.per_device_train_batch_size, trainer.num_generations
    prompts = [draw(shape.prompt) for _ in range(-(-rows // group))]
    device = trainer.args.device
    prompt_ids = torch.tensor([prompts[i // group] for i in range(rows)], device=device)
    completion_ids = torch.tensor([draw(shape.answer) for _ in range(rows)], device=device)
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "advantages": torch.ones(rows, device=device),
        "num_items_in_batch": torch.tensor(rows * shape.answer, device=device),
    }
    if method == "rloo":
        inputs["old_logps"] = torch.zeros(rows, device=device)
    elif trainer.beta != 0.0:
        inputs["ref_per_token_logps"] = torch.zeros(completion_ids.shape, device=device)
    return inputs


def _drawer(trainer: Any) -> Callable[[int], list[int]]:
    generator = torch.Generator().manual_seed(0)
    vocab = trainer.model.config.get_text_config().vocab_size
    tokens = min(vocab, len(trainer.processing_class))

    def draw(count: int) -> list[int]:
        return torch.randint(
            min(_FIRST, tokens - 1), tokens, (count,), generator=generator
        ).tolist()

    return draw


def _pair(data: Any) -> tuple[list[int], list[int]]:
    chosen, rejected = (list(_lengths(data, f"{side}_ids")) for side in ("chosen", "rejected"))
    return chosen, rejected


def _lengths(data: Any, column: str) -> Iterator[int]:
    """Of every row, without making Python lists of the tokens."""
    for part in data.select_columns([column]).with_format("arrow").iter(10_000):
        yield from pc.list_value_length(part[column]).to_pylist()


def _longest_prompt(trainer: Any) -> int:
    data = trainer.train_dataset
    prompts = data["prompt"]
    longest = sorted(range(len(data)), key=lambda i: -len(str(prompts[i])))[:_PROMPTS_TRIED]
    found = []
    for i in longest:
        prompt = prompts[i]
        if isinstance(prompt, str):
            found.append(len(trainer.processing_class(prompt)["input_ids"]))
            continue
        rendered = trainer.processing_class.apply_chat_template(
            prompt,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(trainer.chat_template_kwargs or {}),
        )
        found.append(len(rendered["input_ids"]))
    return max(found)
