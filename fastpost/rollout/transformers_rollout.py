"""Sampling with transformers: `generate` on a padded batch, or continuous batching.

The model is lent for the time of one rollout. It samples under its own dtype, or under a copy in
another dtype that is brought up to date first (`cast_copy`); the trained weights are never cast.

Log-probs of the sampled tokens cost one log-sum-exp a step and one step's logits, not those of the
whole rollout. They are those of the logits after penalties, divided by the temperature. Top-k,
top-p and min-p are not part of them: the trainer's log-probs know nothing of these either.
Continuous batching reports its own, which do contain them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import ContinuousBatchingConfig

from fastpost.rollout.cast_copy import CastCopy
from fastpost.rollout.interface import Completions, cut_at_end, require_one_each


class TransformersRollout:
    """Samples from a transformers causal language model.

    Args:
        lend_model: opens a context with the model to sample from, plain or wrapped by PEFT, ready
            to generate (unwrapped, gradient checkpointing off). `lambda: nullcontext(model)` will
            do where nothing wraps the model.
        generation_config: how to sample. Its `pad_token_id` and `eos_token_id` must be set.
        rollout_dtype: dtype of the copy to sample from, such as "bfloat16" (adapters are merged
            into it). None samples from the model itself.
        continuous_batching: a configuration turns continuous batching on.
        pad_to_multiple_of: prompts are padded to a multiple of this many tokens.
        needs_logps: report the log-probs of the sampled tokens.
        logps_temperature: the temperature of these log-probs, for a method that scores at another
            than it samples at. None: the sampling temperature.

    Attributes:
        copy: the copy to sample from, None without `rollout_dtype`.

    Raises:
        ValueError: unknown `rollout_dtype`, the configuration lacks a token id, or continuous
            batching with a `logps_temperature` of its own.
    """

    def __init__(
        self,
        lend_model: Callable[[], AbstractContextManager[Any]],
        generation_config: GenerationConfig,
        *,
        rollout_dtype: str | None = None,
        continuous_batching: ContinuousBatchingConfig | None = None,
        pad_to_multiple_of: int | None = None,
        needs_logps: bool = False,
        logps_temperature: float | None = None,
    ) -> None:
        eos = generation_config.eos_token_id
        if generation_config.pad_token_id is None or eos is None:
            raise ValueError(
                "generation_config needs pad_token_id and eos_token_id, got "
                f"{generation_config.pad_token_id} and {eos}; take them from the tokenizer"
            )
        self.copy = None if rollout_dtype is None else CastCopy(rollout_dtype)
        self._lend_model = lend_model
        self._generation_config = generation_config
        self._pad_token_id = int(generation_config.pad_token_id)
        self._eos_token_ids = [int(eos)] if isinstance(eos, int) else [int(i) for i in eos]
        self._continuous_batching = continuous_batching
        self._pad_to_multiple_of = pad_to_multiple_of
        self._needs_logps = needs_logps
        sampled_at = generation_config.temperature or 1.0
        self._logps_temperature = sampled_at if logps_temperature is None else logps_temperature
        if continuous_batching is not None and self._logps_temperature != sampled_at:
            raise ValueError(
                f"continuous batching reports log-probs at the sampling temperature ({sampled_at})"
                f", not at {logps_temperature}; leave logps_temperature=None"
            )

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]]) -> Completions:
        """Complete every prompt once, under the current weights.

        Raises:
            RuntimeError: the sampler returned fewer completions than prompts.
        """
        with self._lend_model() as lent:
            model = lent if self.copy is None else self.copy.refresh(lent)
            if self._continuous_batching is not None:
                return self._generate_continuously(model, prompt_ids)
            return self._generate_padded(model, prompt_ids)

    def _generate_padded(self, model: Any, prompt_ids: list[list[int]]) -> Completions:
        input_ids, attention_mask = self._pad_left(prompt_ids, model.device)
        recorder = _LogprobRecorder(self._logps_temperature)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=self._generation_config,
            logits_processor=LogitsProcessorList([recorder] if self._needs_logps else []),
        )
        completion_ids = [
            cut_at_end(row, self._eos_token_ids) for row in output[:, input_ids.shape[1] :].tolist()
        ]
        if not self._needs_logps:
            return Completions(completion_ids)
        logps = recorder.logps(output).tolist()
        return Completions(
            completion_ids,
            [row[: len(ids)] for row, ids in zip(logps, completion_ids, strict=True)],
        )

    def _generate_continuously(self, model: Any, prompt_ids: list[list[int]]) -> Completions:
        assert self._continuous_batching is not None
        outputs = model.generate_batch(
            prompt_ids,
            generation_config=self._generation_config,
            continuous_batching_config=dataclasses.replace(
                self._continuous_batching, return_logprobs=self._needs_logps
            ),
            progress_bar=False,
        )
        found = [output for output in outputs.values() if output.error is None]
        require_one_each(found, prompt_ids, "continuous batching")
        completion_ids = [cut_at_end(o.generated_tokens, self._eos_token_ids) for o in found]
        if not self._needs_logps:
            return Completions(completion_ids)
        return Completions(
            completion_ids,
            [o.logprobs[: len(ids)] for o, ids in zip(found, completion_ids, strict=True)],
        )

    def _pad_left(self, prompt_ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and mask `[B, T]`, the prompts on the right."""
        width = max(len(ids) for ids in prompt_ids)
        if self._pad_to_multiple_of is not None:
            width += -width % self._pad_to_multiple_of
        rows = [[self._pad_token_id] * (width - len(ids)) + ids for ids in prompt_ids]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids]
        return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


class _LogprobRecorder(LogitsProcessor):
    """Keeps one step's logits until the token sampled from them is known."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._logits: Tensor | None = None
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._logits is not None:
            self._take(input_ids[:, -1])
        self._logits = scores
        return scores

    def logps(self, output: Tensor) -> Tensor:
        """Log-probs `[B, C]` of the tokens generated, of which `output` holds the last."""
        self._take(output[:, -1])
        self._logits = None
        return torch.stack(self._steps, dim=1)

    def _take(self, tokens: Tensor) -> None:
        assert self._logits is not None
        logits = self._logits.float() / self._temperature
        sampled = logits.gather(1, tokens[:, None])[:, 0]
        self._steps.append(sampled - logits.logsumexp(-1))


__all__ = ["TransformersRollout"]
