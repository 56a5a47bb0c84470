"""What is in checkpoints, read plainly."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from tests.trainers.resumable import differences


def all_differences(one: Path, other: Path) -> list[str]:
    """Where two checkpoints differ in one bit, their shards as well."""
    found = differences(one, other)
    if (one / "shards").exists() or (other / "shards").exists():
        found += differences(one / "shards", other / "shards")
    return found


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the shards of a checkpoint, whole."""
    found: dict[str, torch.Tensor] = {}
    pieces: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for file in (checkpoint / "shards").iterdir():
        with safe_open(file, "pt") as shard:
            places = json.loads(shard.metadata()["DCP_SHARDING_INFO"])
            for name in shard.keys():  # noqa: SIM118
                piece = shard.get_tensor(name)
                pieces.setdefault(name, []).append((places[name]["saved_offsets"], piece))
    for name, parts in pieces.items():
        ends = [[start + n for start, n in zip(at, part.shape, strict=True)] for at, part in parts]
        whole = torch.zeros(
            [max(column) for column in zip(*ends, strict=True)], dtype=parts[0][1].dtype
        )
        for at, part in parts:
            whole[tuple(slice(a, a + n) for a, n in zip(at, part.shape, strict=True))] = part
        found[name] = whole
    return found
