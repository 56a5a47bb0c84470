"""Which prompts come when: a new order every epoch, one generation batch at a time.

`transformers.Trainer` takes one batch from the data loader per forward. A rollout serves several of
them, so its prompts are yielded as many times in a row; all but the first are ignored. The order is
a function of seed and epoch alone, and the epoch one of the forwards done: nothing to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class PromptOrder(Sampler[int]):
    """Indices of prompts; those that do not fill a generation batch wait for the next epoch.

    Args:
        num_prompts: prompts in the data set.
        prompts_per_rollout: prompts of one rollout, over all ranks.
        repeats: forwards that one rollout serves.
        seed: of the order.
        forwards_done: says how many forwards were taken since training began.

    Raises:
        ValueError: there are fewer prompts than one rollout takes.
    """

    def __init__(
        self,
        num_prompts: int,
        prompts_per_rollout: int,
        repeats: int,
        seed: int,
        forwards_done: Callable[[], int],
    ) -> None:
        if num_prompts < prompts_per_rollout:
            raise ValueError(
                f"train_dataset has {num_prompts} prompts, one rollout takes {prompts_per_rollout} "
                "(per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches * "
                "processes / num_generations); lower one of these or give more prompts"
            )
        self._num_prompts = num_prompts
        self._prompts_per_rollout = prompts_per_rollout
        self._repeats = repeats
        self._seed = seed
        self._forwards_done = forwards_done
        self._rollouts = num_prompts // prompts_per_rollout

    def __iter__(self) -> Iterator[int]:
        epoch = self._forwards_done() // (self._rollouts * self._repeats)
        generator = torch.Generator().manual_seed(self._seed + epoch)
        order = torch.randperm(self._num_prompts, generator=generator).tolist()
        for batch in range(self._rollouts):
            first = batch * self._prompts_per_rollout
            for _ in range(self._repeats):
                yield from order[first : first + self._prompts_per_rollout]

    def __len__(self) -> int:
        return self._rollouts * self._prompts_per_rollout * self._repeats


__all__ = ["PromptOrder"]
