"""Prompts of a data set completed by the policy: as text, as tokens, and with their columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from fastpost.rollout.interface import Rollout


@dataclass
class Samples:
    """One entry per completion, the completions of a prompt side by side.

    Attributes:
        prompts: as in the data set, strings or lists of messages.
        completions: strings, or lists of one message by the assistant.
        prompt_ids: tokens of the prompts, the chat template applied.
        completion_ids: sampled tokens, the end token included.
        has_ended: whether the completion came to its end token.
        sampling_logps: of the sampled tokens under the model that sampled, where it said so.
        columns: the data set's other columns.
    """

    prompts: list[Any]
    completions: list[Any]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    has_ended: list[bool]
    sampling_logps: list[list[float]] | None
    columns: dict[str, list[Any]]


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the tokenizer's and those of the model's generation."""
    configured = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id}
    found.update(configured if isinstance(configured, list) else [configured])
    return sorted(token for token in found if token is not None)


def whole_distribution(**settings: Any) -> GenerationConfig:
    """Sample from the model's own distribution, whose log-probs are learnt from.

    What is left unset, transformers takes from the model's `generation_config`, and instruction
    models bring top-p, top-k and a repetition penalty.
    """
    return GenerationConfig(
        do_sample=True,
        num_beams=1,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        **settings,
    )


def sample(
    rollout: Rollout,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    num_generations: int,
    eos_token_ids: list[int],
) -> Samples:
    """Complete the prompt of every row `num_generations` times.

    Raises:
        TypeError: a prompt that is neither a string nor a list of messages.
    """
    rows = [row for row in rows for _ in range(num_generations)]
    prompts = [row["prompt"] for row in rows]
    prompt_ids = [_tokens(prompt, tokenizer) for prompt in prompts]
    sampled = rollout.generate(prompt_ids)
    texts = tokenizer.batch_decode(sampled.completion_ids, skip_special_tokens=True)
    return Samples(
        prompts=prompts,
        completions=[
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        prompt_ids=prompt_ids,
        completion_ids=sampled.completion_ids,
        has_ended=[ids[-1:] != [] and ids[-1] in eos_token_ids for ids in sampled.completion_ids],
        sampling_logps=sampled.logps,
        columns={name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
    )


def _tokens(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) for m in prompt):
        return tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    raise TypeError(
        f"the column prompt holds a {type(prompt).__name__}; give a string or a list of messages "
        "{'role': ..., 'content': ...}"
    )


__all__ = ["Samples", "end_token_ids", "sample", "whole_distribution"]
