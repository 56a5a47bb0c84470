"""Scores of completions from reward functions and reward models, weighted and summed.

A reward function follows TRL's convention:

    fn(prompts=, completions=, completion_ids=, **columns) -> list of float, or None: no opinion

`columns` are the data set's other columns, one value per completion. A reward model is a sequence
classifier of one label, or a path to one. It reads what reward models are trained on: the whole
conversation under its own chat template, or prompt and completion as text with the end-of-sequence
token, if the completion came to its end. Rows of the same prompt share its computation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpost.pooling import accelerate_pooled
from fastpost.ppo.samples import Samples

RewardFunction = Callable[..., list[float | None]] | nn.Module | str | Path


class RewardScores:
    """Asks every reward function about sampled completions.

    Args:
        functions: one or several callables, reward models or paths.
        weights: one factor each; None weighs all by 1.
        tokenizer: the policy's, for reward models that do not say where they came from.
        prefix_sharing: of the reward models' forward.
        rows: completions a reward model scores at a time.

    Attributes:
        names: of the functions, as they are logged.
        models: the reward models, frozen.

    Raises:
        TypeError: not a reward function, or an asynchronous one.
        ValueError: no function, another number of weights, or a model with several labels.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None,
        tokenizer: Any,
        *,
        prefix_sharing: bool,
        rows: int,
    ) -> None:
        if not isinstance(functions, list | tuple):
            functions = [functions]  # type: ignore[list-item]
        if not functions:
            raise ValueError("reward_funcs is empty; give at least one reward function or model")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions):
            raise ValueError(
                f"reward_weights has {len(weights)} numbers for {len(functions)} reward_funcs; "
                "give one each"
            )
        self._weights = torch.tensor(weights, dtype=torch.float32)
        self._askers: list[Callable[[Samples], Tensor]] = []
        self.models: list[nn.Module] = []
        self.names: list[str] = []
        for function in functions:
            if isinstance(function, str | Path | nn.Module):
                model = _RewardModel(function, tokenizer, prefix_sharing, rows)
                self.models.append(model.model)
                self._add(model.name, model)
            elif not callable(function) or inspect.iscoroutinefunction(function):
                raise TypeError(
                    "a reward function is a callable that returns a list of floats, a sequence "
                    f"classifier or a path to one, got {type(function).__name__}"
                    f"{' (a coroutine: make it synchronous)' if callable(function) else ''}"
                )
            else:
                name = getattr(function, "__name__", type(function).__name__)
                self._add(name, partial(_ask, name, function))

    def _add(self, name: str, asker: Callable[[Samples], Tensor]) -> None:
        same = sum(other == name or other.startswith(f"{name}_") for other in self.names)
        self.names.append(f"{name}_{same + 1}" if same else name)
        self._askers.append(asker)

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Weighted sum `[B]`, and each function's own rewards `[B, F]`; fp32 on the CPU.

        NaN where a function had no opinion; the sum leaves it out, and is NaN where none had one.

        Raises:
            ValueError: not one finite number or None for each completion.
        """
        rewards = torch.stack([ask(samples) for ask in self._askers], dim=1)
        total = (rewards * self._weights).nansum(dim=1)
        return total.masked_fill(rewards.isnan().all(dim=1), math.nan), rewards


def _ask(name: str, function: Callable[..., list[float | None]], samples: Samples) -> Tensor:
    """Rewards `[B]` of a function, NaN for None."""
    found = function(
        prompts=samples.prompts,
        completions=samples.completions,
        completion_ids=samples.completion_ids,
        **samples.columns,
    )
    if len(found) != len(samples.prompts):
        raise ValueError(
            f"reward function '{name}' returned {len(found)} rewards for {len(samples.prompts)} "
            "completions; return one each"
        )
    rewards = [math.nan if reward is None else float(reward) for reward in found]
    if any(math.isinf(reward) for reward in rewards):
        raise ValueError(
            f"reward function '{name}' returned an infinite reward; return a finite number, or "
            "None for no opinion"
        )
    return torch.tensor(rewards, dtype=torch.float32)


class _RewardModel:
    """A frozen sequence classifier and its tokenizer."""

    def __init__(
        self, source: str | Path | nn.Module, tokenizer: Any, prefix_sharing: bool, rows: int
    ) -> None:
        model: Any = source
        if not isinstance(source, nn.Module):
            model = AutoModelForSequenceClassification.from_pretrained(
                str(source), num_labels=1, dtype="auto"
            )
        config = model.config
        if config.num_labels != 1:
            raise ValueError(
                f"a reward model has num_labels=1, got {type(model).__name__} with "
                f"{config.num_labels}"
            )
        path = getattr(config, "_name_or_path", "")
        self.tokenizer = AutoTokenizer.from_pretrained(path) if path else tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # the reward is read at the last token that is not this one
        config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.name = Path(path).name if path else type(model).__name__
        self.model = model.requires_grad_(False).eval()
        self.engine = accelerate_pooled(model, prefix_sharing=prefix_sharing)
        self._rows = rows

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """Rewards `[B]` fp32 on the CPU."""
        texts = [self._text(samples, row) for row in range(len(samples.prompts))]
        scores = []
        for first in range(0, len(texts), self._rows):
            inputs = self.tokenizer(
                texts[first : first + self._rows],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            ).to(self.model.device)
            output = self.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            )
            scores.append(output.logits[:, 0].float().cpu())
        return torch.cat(scores)

    def _text(self, samples: Samples, row: int) -> str:
        prompt, completion = samples.prompts[row], samples.completions[row]
        if not isinstance(prompt, str):
            return self.tokenizer.apply_chat_template(prompt + completion, tokenize=False)
        return prompt + completion + (self.tokenizer.eos_token if samples.has_ended[row] else "")


__all__ = ["RewardFunction", "RewardScores"]
