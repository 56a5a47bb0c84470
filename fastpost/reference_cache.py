"""Log-probs of a frozen reference, computed once and kept on disk by what they depend on.

    row = (token ids, weight of each token)  ─►  Σ_t w_t · log π_ref(t | before t)

The folder is named after everything that enters such a sum beside the row: the reference's weights
and configuration, temperature, autocast, and the version of this file's arithmetic. A row is found
by the SHA-256 of its tokens and weights, and these already contain tokenizer, chat template and
truncation. So nothing stale can be read, other data sets share the rows they have in common, and
adding rows computes the new ones alone. The base of an adapter and the bare model have one name.

    ${FASTPOST_CACHE:-~/.cache/fastpost}/reference/<name>/rows-<writer>.log

A log holds records of fixed size, each with its checksum, appended after every forward: a killed
computation goes on at the row where it stopped. A damaged record is computed again. Every process
writes a log of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from warnings import warn

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from fastpost.backbone import FastpostWarning
from fastpost.cache_folder import cache_root

# Raise when log-probs of the same row and weights come out otherwise by more than rounding.
_ARITHMETIC_VERSION = 1
_RECORD = np.dtype([("key", "V32"), ("value", "<f4"), ("check", "<u4")])
# What a configuration says beside how the model computes.
_NEUTRAL_CONFIG = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


class ScoredRow(NamedTuple):
    """A row whose weighted log-prob is asked for.

    Attributes:
        ids: `[T]` int64, tokens without padding.
        weights: `[T]` fp32, weight of each token's log-prob; 0 is not scored. The first token has
            no prediction, so its weight does not count.
    """

    ids: np.ndarray
    weights: np.ndarray

    def digest(self) -> bytes:
        """32 bytes that name the row."""
        ids, weights = self.ids.astype("<i8"), self.weights.astype("<f4")
        return hashlib.sha256(ids.tobytes() + weights.tobytes()).digest()


def unpadded_row(ids: Tensor, attention_mask: Tensor, weights: Tensor) -> ScoredRow:
    """A row `[T]` of a padded batch without its padding."""
    attended = attention_mask.bool()
    return ScoredRow(ids[attended].numpy(), weights[attended].float().numpy())


class CacheReport(NamedTuple):
    """What a look-up found. `str()` is what a run prints.

    Attributes:
        name: name of the folder, which says what the log-probs depend on.
        rows: rows asked for.
        computed: distinct rows that were not there.
    """

    name: str
    rows: int
    computed: int

    def __str__(self) -> str:
        return f"cached, {self.rows:,} rows ({self.computed:,} computed now), sha {self.name[:12]}"


def reference_digest(model: nn.Module) -> str:
    """SHA-256 of what a reference computes with: weights and configuration.

    Under PEFT that is the base model, and the adapter "ref" if there is one (TRL's copy of an
    adapter that is trained further); the trained adapter does not enter. Weights that another
    process holds (meta tensors) enter by name and shape.
    """
    base: Any = model
    adapter_parts: set[str] = set()
    if hasattr(model, "get_base_model"):  # PEFT
        base = model.get_base_model()  # type: ignore[operator]
        adapter_parts = {"modules_to_save"}
        for module in base.modules():
            adapter_parts.update(getattr(module, "adapter_layer_names", ()))
    weights: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        parts = name.split(".")
        if adapter_parts & set(parts) and "ref" not in parts:
            continue
        weights[".".join(p for p in parts if p not in ("base_layer", "original_module"))] = tensor
    described = {
        name: value
        for name, value in base.config.to_dict().items()
        if name not in _NEUTRAL_CONFIG and not name.endswith("_token_id")
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    names = sorted(weights)
    with ThreadPoolExecutor() as pool:
        for name, content in zip(names, pool.map(_hash, (weights[n] for n in names)), strict=True):
            digest.update(name.encode() + content)
    return digest.hexdigest()


def _hash(tensor: Tensor) -> bytes:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    about = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    if tensor.is_meta:
        return hashlib.sha256(about).digest()
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(about + b":").digest() + hashlib.sha256(content).digest()


def cache_folder(reference: str, autocast: str, temperature: float = 1.0) -> Path:
    """Where the log-probs of a reference are kept.

    Args:
        reference: its `reference_digest`.
        autocast: precision it runs under ("no", "bf16", "fp16").
        temperature: logits are divided by it.
    """
    told = json.dumps([_ARITHMETIC_VERSION, reference, autocast, temperature])
    return cache_root() / "reference" / hashlib.sha256(told.encode()).hexdigest()


class ReferenceStore:
    """Log-probs of one reference on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / f"rows-{uuid.uuid4().hex}.log"

    def read(self) -> dict[bytes, float]:
        """Digest of each row -> its log-prob. Warns of damaged records, and drops them."""
        found: dict[bytes, float] = {}
        for path in sorted(self.folder.glob("rows-*.log")):
            content = path.read_bytes()
            # A killed writer leaves part of a record at the end.
            records = np.frombuffer(content, _RECORD, count=len(content) // _RECORD.itemsize)
            sound = [r for r in records if _checksum(r["key"], r["value"]) == r["check"]]
            if len(sound) < len(records):
                warn(
                    f"fastpost: {len(records) - len(sound)} of {len(records)} records in {path} "
                    "are damaged; their log-probs are computed again",
                    FastpostWarning,
                    stacklevel=2,
                )
                whole = path.with_suffix(".sound")
                whole.write_bytes(b"".join(record.tobytes() for record in sound))
                os.replace(whole, path)
            found.update((bytes(record["key"]), float(record["value"])) for record in sound)
        return found

    def append(self, keys: Sequence[bytes], values: Iterable[float]) -> None:
        """Add rows; they outlive the process once this returns."""
        records = np.zeros(len(keys), _RECORD)
        for record, key, value in zip(records, keys, values, strict=True):
            record["key"], record["value"] = np.void(key), value
            record["check"] = _checksum(record["key"], record["value"])
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            log.write(records.tobytes())
            log.flush()
            os.fsync(log.fileno())


def _checksum(key: np.void, value: np.float32) -> int:
    return zlib.crc32(key.tobytes() + value.tobytes())


def cached_logps(
    rows: Sequence[ScoredRow],
    folder: Path,
    score: Callable[[list[ScoredRow]], Tensor],
    *,
    batch_rows: int,
    accelerator: Any,
    description: str | None = None,
) -> tuple[Tensor, CacheReport]:
    """Log-probs of rows, from disk where they are there, otherwise computed and kept.

    Args:
        rows: the rows, on every process the same.
        folder: see `cache_folder`.
        score: gives the weighted log-probs of up to `batch_rows` rows. Every process calls it
            equally often, so that a sharded reference may take part in each call.
        batch_rows: rows in a forward.
        accelerator: tells the processes apart; the first one's disk decides what is missing.
        description: heading of the progress bar, None for no bar.

    Returns:
        `[len(rows)]` fp32 on the CPU, and what was found.

    Raises:
        ValueError: the reference gives a log-prob that is not finite.
    """
    store = ReferenceStore(folder)
    keys = [row.digest() for row in rows]
    known: dict[bytes, float] = {}
    if accelerator.is_main_process:
        on_disk = store.read()
        known = {key: on_disk[key] for key in keys if key in on_disk}
    known = broadcast_object_list([known])[0]
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    # Rows with equal beginnings side by side: the engine computes a shared prompt once a batch.
    order = sorted(missing, key=lambda key: missing[key].ids.astype(">i8").tobytes())
    batches = [order[i : i + batch_rows] for i in range(0, len(order), batch_rows)]
    world, rank = accelerator.num_processes, accelerator.process_index
    computed: list[tuple[bytes, float]] = []
    for start in tqdm(range(0, len(batches), world), desc=description, disable=description is None):
        batch = batches[min(start + rank, len(batches) - 1)]
        values = score([missing[key] for key in batch]).float().cpu()
        if not torch.isfinite(values).all():
            raise ValueError(
                "the reference gives a log-prob that is not finite; look at its weights and at its "
                "precision (fp16 overflows where bf16 does not)"
            )
        if start + rank < len(batches):
            store.append(batch, values.tolist())
            computed += zip(batch, values.tolist(), strict=True)
    known.update(gather_object(computed))
    found = torch.tensor([known[key] for key in keys], dtype=torch.float32)
    return found, CacheReport(folder.name, len(rows), len(missing))


__all__ = [
    "CacheReport",
    "ReferenceStore",
    "ScoredRow",
    "cache_folder",
    "cached_logps",
    "reference_digest",
    "unpadded_row",
]
