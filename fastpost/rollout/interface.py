"""What a trainer asks of a sampler.

A group of completions is asked for by repeating its prompt: one result per prompt given, in their
order. Prompts and completions are token ids without padding; a completion ends with its end token
where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Completions:
    """What was sampled, one entry per prompt.

    Attributes:
        completion_ids: sampled tokens, the end token included.
        logps: log-prob of each of them under the model that sampled, at the sampling temperature;
            None where the sampler did not say. A single value may be NaN (not known).
    """

    completion_ids: list[list[int]]
    logps: list[list[float]] | None = None


class Rollout(Protocol):
    """Samples one completion for each prompt."""

    def generate(self, prompt_ids: list[list[int]]) -> Completions:
        """Complete every prompt once, under the current weights."""
        ...


def cut_at_end(completion_ids: list[int], eos_token_ids: list[int]) -> list[int]:
    """The completion up to its first end token, which is kept."""
    for place, token in enumerate(completion_ids):
        if token in eos_token_ids:
            return completion_ids[: place + 1]
    return completion_ids


def require_one_each(found: list[Any], prompt_ids: list[list[int]], sampler: str) -> None:
    """Refuse an answer that is not one completion for each prompt.

    Raises:
        RuntimeError: with the two counts.
    """
    if len(found) != len(prompt_ids):
        raise RuntimeError(
            f"{sampler} returned {len(found)} completions for {len(prompt_ids)} prompts; see its "
            "log above for the request that failed"
        )


__all__ = ["Completions", "Rollout", "cut_at_end", "require_one_each"]
