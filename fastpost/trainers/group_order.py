"""Groups of completions stay together on their way to the micro-batches.

TRL's GRPO and RLOO trainers shuffle a generation batch completion by completion before they split
it, so that the completions of a prompt end up in different forwards and the prompt is computed once
for each. Here groups are shuffled instead. What a step learns from changes in nothing but this
order: rewards and advantages are those of the same groups.

Where a micro-batch divides a group, the shuffle moves parts of that size: the same sharing, and
the steps stay as mixed as they can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from fastpost.scoring import FastpostWarning


def shuffle_groups(batch: dict[str, Any], group_size: int, start: int = 0) -> dict[str, Any]:
    """Permute the groups of every value of `batch` in unison, the order within a group kept.

    Args:
        batch: tensors `[B, ...]` and sequences of length B, permuted; None and tensors without
            dimensions, handed through.
        group_size: rows of a group, which are neighbours.
        start: place of the first row in the batch of all processes. A group may have begun on the
            process before; what is left of it here counts as a group.
    """
    num_rows = len(next(value for value in batch.values() if value is not None))
    group_of = torch.arange(start, start + num_rows).div(group_size, rounding_mode="floor")
    # The random numbers are those TRL draws, so that what is sampled next stays the same: groups
    # come in the order in which TRL's permutation first meets one of their rows.
    met = dict.fromkeys(group_of[torch.randperm(num_rows)].tolist())
    order = torch.cat([(group_of == group).nonzero()[:, 0] for group in met])

    def permute(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        if isinstance(value, Tensor):
            return value[order.to(value.device)]
        return [value[i] for i in order.tolist()]

    return {name: permute(value) for name, value in batch.items()}


@contextmanager
def groups_kept_together(
    trl_module: ModuleType, group_size: int, micro_batch: int, start: int
) -> Iterator[None]:
    """Shuffle groups wherever the module's trainer would shuffle completions.

    Args:
        trl_module: the module of the trainer, whose `shuffle_sequence_dict` is swapped meanwhile.
        group_size: completions of a prompt.
        micro_batch: rows of a forward.
        start: see `shuffle_groups`.
    """
    size = micro_batch if group_size % micro_batch == 0 else group_size
    stock = trl_module.shuffle_sequence_dict
    trl_module.shuffle_sequence_dict = lambda batch: shuffle_groups(batch, size, start)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trl_module.shuffle_sequence_dict = stock  # type: ignore[attr-defined]


def warn_of_split_groups(args: Any) -> None:
    """Say what a micro-batch costs that does not hold whole groups."""
    rows, group = args.per_device_train_batch_size, args.num_generations
    if rows % group == 0 or not args.prefix_sharing:
        return
    warn(
        f"fastpost: per_device_train_batch_size ({rows}) is not a multiple of num_generations "
        f"({group}), so groups are split over forwards and their prompt is computed in each of "
        f"them, about {group / min(rows, group):.2g} times instead of once; set it to a multiple "
        f"of {group} and lower gradient_accumulation_steps",
        FastpostWarning,
        stacklevel=2,
    )


__all__ = ["groups_kept_together", "shuffle_groups", "warn_of_split_groups"]
