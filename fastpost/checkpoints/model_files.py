"""A model as transformers and PEFT load it, written one tensor at a time.

`save_pretrained` and `safetensors.save_file` take a whole model, or a whole file of it, in memory.
Here the header is written from shapes and each tensor follows as it is read, so that host memory
holds one tensor, whatever the size of the model. Files are cut as `save_pretrained` cuts them, and
an index says where each tensor is.

Format: https://huggingface.co/docs/safetensors (eight bytes, the length of a JSON header that gives
dtype, shape and place of each tensor; then their bytes, row by row).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

__all__ = ["Described", "write_adapters", "write_description", "write_model"]

# Shape and dtype of a tensor.
Described = tuple[tuple[int, ...], torch.dtype]

# As `save_pretrained` cuts by default.
_FILE_BYTES = 5 * 10**9
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_model(
    folder: str | Path,
    tensors: Mapping[str, Described],
    read: Callable[[str], Tensor],
    *,
    is_writer: bool = True,
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Write `model.safetensors`, or its parts and `model.safetensors.index.json`.

    Args:
        folder: where to; it exists.
        tensors: name -> shape and dtype, in the order of the files.
        read: name -> the whole tensor on the CPU. It may gather it from all processes, which then
            all call `write_model`.
        is_writer: whether this process writes.
        file_bytes: most bytes of tensors in a file that has more than one.
    """
    files: list[list[str]] = [[]]
    filled = 0
    for name, described in tensors.items():
        size = _num_bytes(described)
        if files[-1] and filled + size > file_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    shard_of: dict[str, str] = {}
    for i, names in enumerate(files, start=1):
        file = "model.safetensors"
        if len(files) > 1:
            file = f"model-{i:05}-of-{len(files):05}.safetensors"
        part = {name: tensors[name] for name in names}
        _write_file(Path(folder, file), part, read, is_writer=is_writer)
        shard_of |= dict.fromkeys(names, file)
    if is_writer and len(files) > 1:
        total = sum(_num_bytes(described) for described in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        Path(folder, "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_adapters(
    folder: str | Path,
    adapters: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Described],
    read: Callable[[str], Tensor],
    *,
    is_writer: bool = True,
) -> None:
    """Write each adapter's `adapter_model.safetensors` where PEFT looks for it.

    Args:
        folder: of the adapter "default"; others are in folders of their names.
        adapters: adapter -> name in the file -> name in the model.
        tensors: name in the model -> shape and dtype.
        read: name in the model -> tensor, as for `write_model`.
        is_writer: whether this process writes.
    """
    for adapter, names in adapters.items():
        file = adapter_folder(folder, adapter) / "adapter_model.safetensors"
        if is_writer:
            file.parent.mkdir(parents=True, exist_ok=True)
        part = {key: tensors[name] for key, name in names.items()}
        _write_file(file, part, _renamed(read, names), is_writer=is_writer)


def _renamed(read: Callable[[str], Tensor], names: Mapping[str, str]) -> Callable[[str], Tensor]:
    return lambda key: read(names[key])


def adapter_folder(folder: str | Path, adapter: str) -> Path:
    """Where `PeftModel.save_pretrained` puts an adapter."""
    return Path(folder) if adapter == "default" else Path(folder, adapter)


def write_description(folder: str | Path, model: Any) -> None:
    """Write what is beside the weights: config.json, or of a `PeftModel` adapter_config.json.

    Args:
        folder: where to; it exists.
        model: a transformers model or `PeftModel`, sharded or not.
    """
    if isinstance(model, PeftModel):
        for adapter, config in model.peft_config.items():
            config = copy.copy(config)
            config.inference_mode = True
            if config.base_model_name_or_path is None:
                config.base_model_name_or_path = getattr(
                    model.get_base_model(), "name_or_path", None
                )
            adapter_folder(folder, adapter).mkdir(parents=True, exist_ok=True)
            config.save_pretrained(str(adapter_folder(folder, adapter)))
        return
    config = copy.deepcopy(model.config)
    # FSDP2 gives a model a class of its own.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _write_file(
    path: Path, tensors: Mapping[str, Described], read: Callable[[str], Tensor], *, is_writer: bool
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + _num_bytes((shape, dtype))
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    # Tensors begin at a multiple of eight bytes.
    encoded += b" " * (-len(encoded) % 8)
    if not is_writer:
        for name in tensors:
            read(name)
        return
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, described in tensors.items():
            # No name is bound to the tensor: it is gone before the next is read.
            file.write(_bytes(name, read(name), described))


def _bytes(name: str, tensor: Tensor, described: Described) -> memoryview:
    if (tuple(tensor.shape), tensor.dtype) != described:
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {described}")
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _num_bytes(described: Described) -> int:
    shape, dtype = described
    return math.prod(shape) * dtype.itemsize
