"""Tensors in a folder of shards, read whole, one at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from fastpost.checkpoints.model_files import Described

__all__ = ["ShardFiles"]


class ShardFiles:
    """What the files of all processes hold together.

    Attributes:
        tensors: name -> shape and dtype.
    """

    def __init__(self, folder: Path) -> None:
        metadata: Metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        self._places = metadata.storage_data
        self._found: dict[str, TensorStorageMetadata] = {
            name: found
            for name, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
        self.tensors: dict[str, Described] = {
            name: (tuple(found.size), found.properties.dtype) for name, found in self._found.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor, whole, on the CPU."""
        shape, dtype = self.tensors[name]
        whole = torch.empty(shape, dtype=dtype)
        for piece in self._found[name].chunks:
            place = tuple(
                slice(start, start + size)
                for start, size in zip(piece.offsets, piece.sizes, strict=True)
            )
            file = self._places[MetadataIndex(name, piece.offsets)].relative_path
            with safe_open(file, "pt") as shard:
                whole[place] = shard.get_tensor(name)
        return whole
