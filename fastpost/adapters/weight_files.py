"""Folders of safetensors weights, read and written one shard at a time.

Host memory holds one shard. A folder is written beside its place and renamed when it is whole.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["WeightFolder", "release_freed", "staged", "write_like", "write_several"]

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFolder:
    """A model's folder: which shard holds which tensor.

    Raises:
        ValueError: the folder has no safetensors weights; other formats are never read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / _INDEX
        if index.exists():
            self.shards: dict[str, list[str]] = {}
            for name, file in json.loads(index.read_text())["weight_map"].items():
                self.shards.setdefault(file, []).append(name)
        elif (self.folder / _WHOLE).exists():
            with safe_open(self.folder / _WHOLE, "pt") as file:
                self.shards = {_WHOLE: list(file.keys())}
        else:
            raise ValueError(
                f"{self.folder} has neither {_WHOLE} nor {_INDEX}: give a folder that "
                "save_pretrained wrote (other formats are not read)"
            )
        self.shard_of = {name: file for file, names in self.shards.items() for name in names}

    def read(self, name: str) -> Tensor:
        """One tensor, read alone."""
        if name not in self.shard_of:
            raise ValueError(f"{self.folder} has no tensor {name!r}")
        with safe_open(self.folder / self.shard_of[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def write_like(source: WeightFolder, target: Path, make: Callable[[str, Tensor], Tensor]) -> None:
    """Write `make(name, tensor)` of every tensor of `source` into `target`, in the same shards,
    and everything that is not weights as it is."""
    write_several(source, target, lambda name, tensor: {name: make(name, tensor)})


def write_several(
    source: WeightFolder, target: Path, make: Callable[[str, Tensor], Mapping[str, Tensor]]
) -> None:
    """As `write_like`, with any number of named tensors in place of each; the index follows."""
    shard_of: dict[str, str] = {}
    num_bytes = 0
    for file, names in source.shards.items():
        tensors: dict[str, Tensor] = {}
        with safe_open(source.folder / file, "pt") as shard:
            for name in names:
                made = make(name, shard.get_tensor(name))
                tensors |= {key: tensor.contiguous() for key, tensor in made.items()}
        save_file(tensors, target / file, {"format": "pt"})
        shard_of |= dict.fromkeys(tensors, file)
        num_bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    skipped = {"safetensors", "bin", "pt", "pth", "gguf"}
    for path in source.folder.iterdir():
        if path.is_file() and path.suffix.lstrip(".") not in skipped:
            shutil.copy2(path, target / path.name)
    if (source.folder / _INDEX).exists():
        index = {"metadata": {"total_size": num_bytes}, "weight_map": shard_of}
        (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def release_freed() -> None:
    """glibc keeps what freed working copies leave between the weights, which adds up to several
    times the 4-bit model; elsewhere there is nothing to do."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@contextmanager
def staged(output: str | Path) -> Iterator[Path]:
    """A fresh folder that becomes `output` if nothing is raised, and vanishes otherwise.

    Raises:
        ValueError: `output` exists and is not empty.
    """
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; give a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if output.exists():
            output.rmdir()
        scratch.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
