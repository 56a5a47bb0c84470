"""A sharded checkpoint as a folder that transformers or PEFT loads, host memory one tensor.

    checkpoint-N/shards/*.safetensors ─► each tensor, put together from its pieces ─► OUT/model-*

Weights become `model.safetensors` or its parts with an index; a checkpoint of adapters becomes
`adapter_model.safetensors`, to be put on the base it was trained on, whatever precision that was
stored in. Configuration, tokenizer and chat template come along.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from fastpost.checkpoints.atomic import SAVING, publish, remove_if_empty
from fastpost.checkpoints.model_files import write_adapters, write_model
from fastpost.checkpoints.shard_files import ShardFiles
from fastpost.checkpoints.sharded import OPTIMIZER, SHARDS, read_about
from fastpost.checkpoints.state_files import is_state_file

__all__ = ["Exported", "export_checkpoint"]

# What transformers keeps in a checkpoint for itself.
_FOR_RESUMING = ("trainer_state.json", "training_args.bin", "fastpost_run.json")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        tensors: how many.
        num_bytes: of them.
        adapters: their names; none if it is a whole model.
    """

    tensors: int
    num_bytes: int
    adapters: tuple[str, ...]


def export_checkpoint(
    checkpoint: str | Path, output: str | Path, *, file_bytes: int = 5 * 10**9
) -> Exported:
    """Write `checkpoint` as a model, or as adapters, into `output`.

    `output` has its name when it is whole.

    Raises:
        ValueError: not a sharded checkpoint; `output` is not empty; beside its adapters, weights
            were trained that PEFT does not save.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    about = read_about(checkpoint)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; give a new folder")
    shards = ShardFiles(checkpoint / SHARDS)
    tensors = {name: d for name, d in shards.tensors.items() if not name.startswith(OPTIMIZER)}
    adapters: dict[str, dict[str, str]] = about["adapters"]
    saved = {name for names in adapters.values() for name in names.values()}
    beside = sorted(tensors.keys() - saved) if adapters else []
    if beside:
        raise ValueError(
            f"{checkpoint} holds {len(beside)} trained weights that belong to no adapter, first "
            f"{beside[0]!r}; PEFT saves them only if they are named in modules_to_save"
        )
    staged = output.parent / SAVING / output.name
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        _copy_beside(checkpoint, staged)
        if adapters:
            write_adapters(staged, adapters, tensors, shards.read)
        else:
            write_model(staged, tensors, shards.read, file_bytes=file_bytes)
        publish(staged, output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        remove_if_empty(staged.parent)
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors.values()]
    return Exported(len(sizes), sum(sizes), tuple(adapters))


def _copy_beside(checkpoint: Path, staged: Path) -> None:
    """Configuration, tokenizer, template; of adapters in folders of their own as well."""
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint)
        is_left_out = (
            not path.is_file()
            or name.parts[0] == SHARDS
            or name.name in _FOR_RESUMING
            or path.suffix in (".pt", ".pth", ".safetensors")
            or is_state_file(path)
        )
        if not is_left_out:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, staged / name)
