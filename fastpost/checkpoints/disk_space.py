"""Whether the checkpoints of a run fit on its disk: asked before training, and before each save.

A disk that is full at the tenth checkpoint costs what was trained since the ninth. What a
checkpoint takes follows from the model and the optimizer; how many lie there at once follows from
`save_total_limit`, with one more while it is written, since the oldest is deleted last.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from fastpost.checkpoints.block_scales import BLOCK, SMALL

__all__ = ["CheckpointSize", "bytes_of", "expected_states", "refuse_if_full", "refuse_if_too_many"]

_GIB = 2**30
# Tokenizer, random states, logs; of a tiny model most of the checkpoint.
_BESIDE = 2**24


@dataclasses.dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint, over all processes.

    Attributes:
        weights: of the model, or of its adapters alone.
        states: of the optimizer.
    """

    weights: int
    states: int

    @property
    def total(self) -> int:
        """With what is written beside."""
        return self.weights + self.states + _BESIDE

    def __str__(self) -> str:
        return f"{_gib(self.total)} (weights {_gib(self.weights)}, optimizer {_gib(self.states)})"


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of whole tensors, sharded or not."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def expected_states(optimizer: str, trained: Iterable[Tensor]) -> int:
    """Bytes of states that an optimizer will have.

    Args:
        optimizer: "adamw_8bit", or `optim` of transformers.
        trained: the parameters.

    Returns:
        0 for optimizers that are not known: the first save counts what they really have.
    """
    trained = list(trained)
    if optimizer == "adamw_8bit":
        return sum(_states_8bit(parameter.numel()) for parameter in trained)
    return 2 * bytes_of(trained) if optimizer.startswith("adamw_torch") else 0


def _states_8bit(count: int) -> int:
    return 8 * count if count < SMALL else 2 * (count + 4 * -(-count // BLOCK))


def refuse_if_too_many(
    folder: str | Path, size: CheckpointSize, num_saves: int, limit: int | None
) -> None:
    """Compare what the checkpoints of a run take at most with what is free.

    Args:
        folder: where they go; it need not exist yet.
        size: of one.
        num_saves: how many are written in the run.
        limit: how many are kept, None for all.

    Raises:
        ValueError: they do not fit; the numbers, and what to set.
    """
    if num_saves == 0:
        return
    kept = num_saves if limit is None or limit <= 0 else min(limit, num_saves)
    at_once = min(kept + 1, num_saves)
    # What earlier runs left here is deleted in time, or replaced.
    there = sum(
        file.stat().st_size
        for checkpoint in Path(folder).glob("checkpoint-*")
        for file in checkpoint.rglob("*")
        if file.is_file()
    )
    needed, free = max(at_once * size.total - there, 0), _free(folder)
    if needed > free:
        limits = "" if limit == 1 else f"save_total_limit={max(1, min(kept - 1, 2))}, "
        raise ValueError(
            f"the checkpoints of this run do not fit: {at_once} at once of {size} need "
            f"{_gib(needed)} more, {_gib(free)} are free in {folder}. Set {limits}fewer saves "
            "(save_steps), save_only_model=True, or an output_dir on a larger disk"
        )


def refuse_if_full(folder: str | Path, size: CheckpointSize) -> None:
    """Refuse to begin a checkpoint that the disk cannot hold.

    Raises:
        ValueError: the numbers, and how to go on.
    """
    free = _free(folder)
    if size.total > free:
        raise ValueError(
            f"the next checkpoint takes {size}, {_gib(free)} are free in {folder}; nothing was "
            "written, earlier checkpoints are whole. Make room and go on from the last one with "
            "resume_from_checkpoint=True"
        )


def _free(folder: str | Path) -> int:
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
