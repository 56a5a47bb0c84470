"""Sampling with vLLM, through the driver TRL brings for it (colocated or server).

The driver (`trl.generation.VLLMGeneration`) owns the engine, the weight transfer and the sampling
parameters; here its calls become a `Rollout`: weights are sent once per optimizer step, the
sampled token's log-prob is picked from vLLM's list, and vLLM's "unknown" (None) becomes NaN.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from fastpost.rollout.interface import Completions, require_one_each


class VLLMRollout:
    """Samples with vLLM.

    Args:
        driver: TRL's `VLLMGeneration`, or what has its `sync_weights` and `generate`.
        num_generations: how often each prompt is repeated; a function, as evaluation may ask for
            another number than training.
        step: the optimizer step; weights are sent when it has changed since the last rollout.
    """

    def __init__(
        self,
        driver: Any,
        num_generations: Callable[[], int],
        step: Callable[[], int],
    ) -> None:
        self._driver = driver
        self._num_generations = num_generations
        self._step = step
        self._sent_at: int | None = None

    def generate(self, prompt_ids: list[list[int]]) -> Completions:
        """Complete every prompt once, under the current weights.

        Raises:
            RuntimeError: vLLM returned another number of completions than prompts.
        """
        step = self._step()
        if step != self._sent_at:
            self._driver.sync_weights()
            self._sent_at = step
        _, completion_ids, logprobs, _ = self._driver.generate(
            prompts=prompt_ids,
            images=None,
            num_generations=self._num_generations(),
        )
        require_one_each(completion_ids, prompt_ids, "vLLM")
        logps = None
        if logprobs is not None:
            # The sampled token comes first in vLLM's list of each place.
            logps = [[_known(place[0]) for place in row] for row in logprobs]
        return Completions([list(ids) for ids in completion_ids], logps)


def _known(logprob: float | None) -> float:
    return float("nan") if logprob is None else logprob


def require_vllm() -> None:
    """Ask for vLLM before anything is loaded.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "use_vllm=True needs vLLM, which is not installed: pip install 'fastpost[vllm]', or "
            "set use_vllm=False to sample with transformers"
        )


__all__ = ["VLLMRollout", "require_vllm"]
