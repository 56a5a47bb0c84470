"""State that transformers does not save: JSON, with its tensors in safetensors. Nothing is pickled.

Nested dicts, lists, tuples, numbers, strings and tensors come back as what they were, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

__all__ = ["is_state_file", "num_processes", "read_state", "write_state"]

_STEM = "fastpost_state_"


def write_state(folder: str | Path, state: dict[str, Any], part: int | str = 0) -> None:
    """Write nested dicts, lists, numbers, strings and tensors to two files of `folder`.

    Args:
        folder: where to.
        state: what to.
        part: which process wrote it, or another name for it; part of the names of the files.

    Raises:
        TypeError: a value of another kind, named by its place.
    """
    tensors: dict[str, torch.Tensor] = {}
    described = _describe(state, "state", tensors)
    json_file, tensor_file = _state_files(folder, part)
    # Tensors may share memory with each other, which safetensors refuses.
    save_file(
        {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, tensor_file
    )
    json_file.write_text(json.dumps(described))


def read_state(folder: str | Path, part: int | str = 0) -> dict[str, Any] | None:
    """What `write_state` wrote, tensors on the CPU; None if it wrote nothing there."""
    json_file, tensor_file = _state_files(folder, part)
    if not json_file.is_file():
        return None
    return _rebuild(json.loads(json_file.read_text()), load_file(tensor_file))


def num_processes(folder: str | Path) -> int:
    """How many processes left a state of theirs; 0 where another trainer wrote."""
    files = Path(folder).glob(f"{_STEM}*.json")
    return sum(file.stem.removeprefix(_STEM).isdecimal() for file in files)


def is_state_file(path: Path) -> bool:
    """Whether `write_state` gives files such a name."""
    return path.name.startswith(_STEM)


def _state_files(folder: str | Path, part: int | str) -> tuple[Path, Path]:
    stem = Path(folder) / f"{_STEM}{part}"
    return stem.with_suffix(".json"), stem.with_suffix(".safetensors")


def _describe(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, np.generic):
        return {"value": value.item()}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_describe(v, f"{place}[{i}]", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {k: _describe(v, f"{place}.{k}", tensors) for k, v in value.items()}}
    raise TypeError(
        f"{place} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, None, "
        "lists, tuples and dicts with string keys. Convert it before it is saved"
    )


def _rebuild(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, content),) = described.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "dict":
        return {key: _rebuild(value, tensors) for key, value in content.items()}
    values = [_rebuild(value, tensors) for value in content]
    return values if kind == "list" else tuple(values)
