"""Checkpoints of a sharded model: every process writes its shards, in the background.

    model, optimizer ─► copy in host memory ─► a thread: safetensors, fsync ─► rename (`atomic`)
                        (training stands)       (training goes on)

`torch.distributed.checkpoint` (DCP) cuts, writes and reads. Each file is safetensors and says in
its header where in the whole tensor its pieces belong, so a checkpoint is read by any number of
processes, sharded or not. What is no tensor of at least one dimension (steps, groups, names) is in
`fastpost_state_sharded.json`.

    shards/shard-00001-model-00001-of-00001.safetensors     of the first process
        model.layers.0.mlp.up_proj.weight                   a weight, by its name in the model
        optimizer/model.layers.0.mlp.up_proj.weight/exp_avg a state of the optimizer

Where only adapters train, only they are written, and their optimizer's states. Weights tied to
others are written once.

Host memory: the copy of this process's shards, and the file being written (`_FILE_BYTES`).
"""

from __future__ import annotations

import dataclasses
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fastpost.checkpoints.block_scales import SCALES, fill_scales
from fastpost.checkpoints.shard_files import ShardFiles
from fastpost.checkpoints.state_files import read_state, write_state
from fastpost_kernels import AdamW8bit

__all__ = [
    "OPTIMIZER",
    "SHARDS",
    "Contents",
    "contents_of",
    "is_sharded",
    "load_model",
    "load_optimizer",
    "read_about",
    "save_shards",
    "write_about",
]

SHARDS = "shards"
_ABOUT = "sharded"
_FORMAT = 1
OPTIMIZER = "optimizer/"
# A file is put together in memory before it is written.
_FILE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint of a model holds of it.

    Attributes:
        tensors: name in the model -> tensor, sharing memory with the model.
        adapters: adapter -> name in PEFT's file -> name in the model; empty without adapters.
    """

    tensors: dict[str, Tensor]
    adapters: dict[str, dict[str, str]]


def contents_of(model: nn.Module) -> Contents:
    """All weights and buffers; of a `PeftModel` what PEFT saves and whatever else is trained.

    Raises:
        ValueError: PEFT saves tensors that are not the model's own (prompt learning).
    """
    whole = model.state_dict()
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - trained.keys()
    whole = {name: tensor for name, tensor in whole.items() if name not in tied}
    if not isinstance(model, PeftModel):
        return Contents(whole, {})
    name_of = {id(tensor): name for name, tensor in whole.items()}
    adapters: dict[str, dict[str, str]] = {}
    for adapter, config in model.peft_config.items():
        saved = get_peft_model_state_dict(model, whole, adapter, save_embedding_layers=False)
        if any(id(tensor) not in name_of for tensor in saved.values()):
            raise ValueError(
                f"adapter {adapter!r} ({config.peft_type}) is saved as tensors that the model does "
                "not have, which cannot be written shard by shard; use LoRA or DoRA, or no fsdp"
            )
        adapters[adapter] = {key: name_of[id(tensor)] for key, tensor in saved.items()}
    kept = {name for names in adapters.values() for name in names.values()}
    kept |= {name for name, is_trained in trained.items() if is_trained}
    return Contents({name: t for name, t in whole.items() if name in kept}, adapters)


def save_shards(
    folder: str | Path,
    contents: Contents,
    model: nn.Module,
    optimizer: Optimizer,
    group: dist.ProcessGroup | None,
) -> Future[Any]:
    """Begin to write the shards of this process into `folder`/shards. All processes call it.

    Returns once the tensors are copied; they may change then.

    Args:
        folder: the checkpoint's, on a disk that all processes share.
        contents: of `model`.
        model: the model.
        optimizer: over parameters of the model.
        group: all processes, over a backend for CPU tensors (gloo), used for nothing else; None in
            a run without processes.

    Returns:
        Done when the shards of all processes are on the disk; raises what went wrong in any.

    Raises:
        ValueError: the optimizer keeps plain tensors for parameters that are sharded.
    """
    states, _ = _optimizer_states(model, optimizer)
    tensors = {name: tensor.detach() for name, tensor in (contents.tensors | states).items()}
    # An empty tensor has no bytes to write, and no place.
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    writer = HuggingFaceStorageWriter(
        str(Path(folder, SHARDS)), fqn_to_index_mapping=_files(tensors), save_distributed=True
    )
    saving = dcp.async_save(tensors, storage_writer=writer, process_group=group)
    assert isinstance(saving, Future)
    return saving


def write_about(
    folder: str | Path, contents: Contents, model: nn.Module, optimizer: Optimizer
) -> None:
    """Write what is not in the shards. The first process calls it."""
    _, numbers = _optimizer_states(model, optimizer)
    write_state(
        folder,
        {
            "format": _FORMAT,
            "processes": dist.get_world_size() if dist.is_initialized() else 1,
            "adapters": contents.adapters,
            "optimizer": type(optimizer).__name__,
            "groups": _groups(model, optimizer),
            "numbers": numbers,
        },
        _ABOUT,
    )


def is_sharded(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint that `save_shards` wrote."""
    return Path(folder, SHARDS).is_dir()


def read_about(folder: str | Path) -> dict[str, Any]:
    """What `write_about` wrote.

    Raises:
        ValueError: not such a checkpoint, or one of a later version.
    """
    about = read_state(folder, _ABOUT)
    if about is None or not is_sharded(folder):
        raise ValueError(
            f"{folder} is not a sharded checkpoint (it has no folder {SHARDS!r}); transformers and "
            "PEFT load other checkpoints as they are"
        )
    if about["format"] != _FORMAT:
        raise ValueError(
            f"{folder} is of format {about['format']}, this version reads {_FORMAT}; install the "
            "fastpost that wrote it"
        )
    return about


def load_model(folder: str | Path, model: nn.Module) -> None:
    """Read weights into `model`, sharded or not. All processes call it.

    Raises:
        ValueError: other names, shapes or dtypes; the model is as it was.
    """
    read_about(folder)
    tensors = {name: t for name, t in contents_of(model).tensors.items() if t.numel()}
    _load(folder, tensors, lambda name: not name.startswith(OPTIMIZER))


def load_optimizer(folder: str | Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read states and groups into `optimizer`, over parameters of `model`, sharded or not. All
    processes call it.

    Raises:
        ValueError: another optimizer, other parameters, groups, shapes or dtypes.
    """
    about = read_about(folder)
    if about["optimizer"] != type(optimizer).__name__:
        raise ValueError(
            f"{folder} holds the states of {about['optimizer']}, this run has "
            f"{type(optimizer).__name__}"
        )
    saved, now = about["groups"], _groups(model, optimizer)
    if [group["params"] for group in saved] != [group["params"] for group in now]:
        raise ValueError(
            f"{folder}: the optimizer's groups were of {[len(g['params']) for g in saved]} "
            f"parameters, now they are of {[len(g['params']) for g in now]}, or of others"
        )
    _make_states(optimizer)
    names = _names(model)
    for group, old in zip(optimizer.param_groups, saved, strict=True):
        for parameter in group["params"]:
            if names[parameter] not in about["numbers"]:
                optimizer.state.pop(parameter, None)
        group.update({key: value for key, value in old.items() if key != "params"})
    states, _ = _optimizer_states(model, optimizer)
    states = {name: state for name, state in states.items() if state.numel()}
    cut_anew = _fill_scales(folder, states, model, optimizer)
    _load(
        folder,
        {name: state for name, state in states.items() if name not in cut_anew},
        lambda name: name.startswith(OPTIMIZER) and name not in cut_anew,
    )
    for parameter, state in optimizer.state.items():
        for key, value in about["numbers"][names[parameter]].items():
            if isinstance(value, Tensor):
                state[key].copy_(value)
            else:
                state[key] = value


def _fill_scales(
    folder: str | Path, states: dict[str, Tensor], model: nn.Module, optimizer: Optimizer
) -> set[str]:
    """Read the scales of 8-bit states that were cut for other shards; their names."""
    if not isinstance(optimizer, AdamW8bit):
        return set()
    files = ShardFiles(Path(folder, SHARDS))
    filled = set()
    for parameter, name in _names(model).items():
        for key in SCALES:
            place = f"{OPTIMIZER}{name}/{key}"
            if place not in states or place not in files.tensors:
                continue
            if files.tensors[place][0] != tuple(states[place].shape):
                fill_scales(states[place], files.read(place), parameter)
                filled.add(place)
    return filled


def _load(folder: str | Path, tensors: dict[str, Tensor], is_expected: Any) -> None:
    """Read into `tensors` from the shards, which must have these and no other `is_expected`."""
    reader = HuggingFaceStorageReader(str(Path(folder, SHARDS)))
    saved = {
        name: (tuple(found.size), found.properties.dtype)  # type: ignore[union-attr]
        for name, found in reader.read_metadata().state_dict_metadata.items()
        if is_expected(name)
    }
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if saved != wanted:
        differing = sorted(
            name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)
        )
        lines = [
            f"{name}: {_described(saved.get(name))} in the checkpoint, "
            f"{_described(wanted.get(name))} now"
            for name in differing[:8]
        ]
        raise ValueError(
            f"{folder} has another model or optimizer, {len(differing)} tensors differ; nothing "
            "was loaded:\n  " + "\n  ".join(lines)
        )
    if not tensors:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load({name: tensor.detach() for name, tensor in tensors.items()}, storage_reader=reader)


def _described(found: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "absent" if found is None else f"{list(found[0])} {str(found[1]).removeprefix('torch.')}"


def _names(model: nn.Module) -> dict[Any, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    names = _names(model)
    return [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


def _optimizer_states(
    model: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors by their names in the shards; by parameter what is of no dimension."""
    names = _names(model)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    # In the order of the parameters: that of their first updates may differ from run to run.
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state.get(parameter)
        if not state:
            continue
        name = names[parameter]
        numbers[name] = {}
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                numbers[name][key] = value
                continue
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} of {name} as a plain tensor in each "
                    "process, though the parameter is sharded: it cannot be put together again. "
                    "Use optimizer='adamw_8bit' or optim='adamw_torch'"
                )
            tensors[f"{OPTIMIZER}{name}/{key}"] = value
    return tensors, numbers


def _make_states(optimizer: Optimizer) -> None:
    """Have the optimizer make the states it will have, of the right kind and placement."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which file of its process each tensor goes to, from 1."""
    file, filled, files = 1, 0, {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if filled and filled + local.nbytes > _FILE_BYTES:
            file, filled = file + 1, 0
        files[name] = file
        filled += local.nbytes
    return files
