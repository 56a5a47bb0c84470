"""Scores of reasoning steps: where they stand, what they are, how a solution's are put together.

A process reward model is a token classifier with one label. The score of a step is the probability
that it is right, read at the step's last token:

    prompt  step 1 \\n  step 2 \\n  step 3 \\n
                    ↑          ↑          ↑

Training (`trainers.prm`) and inference encode solutions with the same function, because a score
read elsewhere than it was trained is noise. Sources: Lightman 2023, arXiv 2305.20050; Wang 2024,
"Math-Shepherd", arXiv 2312.08935.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

DEFAULT_SEPARATOR = "\n"


class EncodedSteps(NamedTuple):
    """A solution as tokens.

    Attributes:
        input_ids: prompt and steps.
        ends: index into `input_ids` of each step's last token.
    """

    input_ids: list[int]
    ends: list[int]


def encode_steps(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, str]],
    steps: Sequence[str],
    step_separator: str = DEFAULT_SEPARATOR,
) -> EncodedSteps:
    """Tokenise a prompt and its steps, each step on its own so that its end is a token's end.

    Args:
        prompt: text (a beginning-of-sequence token is put before it if the tokenizer has one), or
            messages for the chat template.
        steps: text of each step, without the separator.
        step_separator: put behind each step; its last token carries the score.

    Raises:
        ValueError: there is no step, or one of them is blank.
    """
    if isinstance(steps, str) or not steps:
        raise ValueError(f"expected a list of one or more steps, got {steps!r}")
    blank = [i for i, step in enumerate(steps) if not step.strip()]
    if blank:
        raise ValueError(f"step {blank[0]} of {len(steps)} is blank: {steps[blank[0]]!r}")
    if isinstance(prompt, str):
        input_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if tokenizer.bos_token_id is not None:
            input_ids = [tokenizer.bos_token_id, *input_ids]
    else:
        input_ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True
        )["input_ids"]
    input_ids = list(input_ids)
    separator = tokenizer(step_separator, add_special_tokens=False)["input_ids"]
    ends = []
    for step in steps:
        input_ids += tokenizer(step, add_special_tokens=False)["input_ids"] + separator
        ends.append(len(input_ids) - 1)
    return EncodedSteps(input_ids, ends)


@torch.no_grad()
def step_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, str]],
    steps: Sequence[str],
    *,
    step_separator: str | None = None,
) -> list[float]:
    """Probability, 0 to 1, that each step is right given the prompt and the steps before it.

    Args:
        model: a token classifier of one label, or one wrapped by PEFT; it is scored in eval mode.
        step_separator: the one it was trained with; None takes it from the model's config, where
            `PRMTrainer` writes it, and "\\n" where the config names none.

    Raises:
        ValueError: the model has not one label, or a step is missing or blank.
    """
    config: Any = model.config
    if config.num_labels != 1:
        raise ValueError(f"a process reward model has num_labels=1, got {config.num_labels}")
    if step_separator is None:
        step_separator = getattr(config, "step_separator", DEFAULT_SEPARATOR)
    encoded = encode_steps(tokenizer, prompt, steps, step_separator)
    device = next(model.parameters()).device
    input_ids = torch.tensor([encoded.input_ids], device=device)
    was_training = model.training
    model.eval()
    try:
        logits: Tensor = model(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False
        ).logits
    finally:
        model.train(was_training)
    return logits[0, encoded.ends, 0].float().sigmoid().tolist()


def aggregate(scores: Sequence[float], how: Literal["min", "product", "last"]) -> float:
    """The score of a solution from the scores of its steps.

    `min` is a chain as strong as its weakest step (Math-Shepherd); `product` the probability that
    every step is right (Lightman 2023, section 2); `last` judges the outcome alone. The probability
    an outcome model gives joins in as one more step: `aggregate([*scores, outcome], "min")`.

    Args:
        scores: probabilities from `step_scores`.

    Raises:
        ValueError: no scores, a score that is no probability, or an unknown `how`.
    """
    if not scores:
        raise ValueError("there are no scores to aggregate; expected one per step")
    if not all(0.0 <= score <= 1.0 for score in scores):
        raise ValueError(f"scores must be probabilities from 0 to 1, got {list(scores)}")
    if how == "min":
        return min(scores)
    if how == "product":
        return math.prod(scores)
    if how == "last":
        return scores[-1]
    raise ValueError(f"how must be 'min', 'product' or 'last', got {how!r}")


__all__ = ["DEFAULT_SEPARATOR", "EncodedSteps", "aggregate", "encode_steps", "step_scores"]
