"""What a run optimises, on which data: written into each checkpoint, compared when it is resumed.

A run resumed with another loss, beta, length, seed, batch or data set goes on without an error and
is a run of neither setting. Each checkpoint therefore holds `fastpost_run.json`:

    objective   fields of the method's configuration, adapter, reward functions,
                optimizer, seeds, rows a step                                          must agree
    data        rows and SHA-256 of the prepared training data                         must agree
    reference   digest of the reference's weights, where there is a reference          must agree
    model       architecture, trained parameters, digest of a sample of frozen ones    must agree
    schedule    learning rate and its schedule, number of steps, precision, layout     warned of
    versions    of the libraries                                                       warned of
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Sized
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

MANIFEST = "fastpost_run.json"
_STRICT_SECTIONS = ("objective", "data", "reference", "model")
_LOOSE_SECTIONS = ("schedule", "versions")
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")

# Of transformers' own fields: part of the objective, or of how long and how precisely.
_OBJECTIVE = frozenset(
    {
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "data_seed",
        "dataloader_drop_last",
        "label_smoothing_factor",
        "max_grad_norm",
        "neftune_noise_alpha",
        "optim",
        "optim_args",
        "optim_target_modules",
        "seed",
        "train_sampling_strategy",
        "weight_decay",
    }
)
_SCHEDULE = frozenset(
    {
        "bf16",
        "fp16",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "warmup_steps",
    }
)
_NEUTRAL_OF_ADAPTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
}
# transformers restores the scheduler, and with it the rate the schedule is a share of.
# Of a model's configuration: where it came from, and what trainers switch.
_NEUTRAL_OF_MODEL = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_SAMPLE = 16
_ABSENT = object()
_REMARKS = {"learning_rate": " (the checkpoint's stays in force)"}
# Of a method's fields: how it is computed, shown or loaded, not what.
_NEUTRAL = frozenset(
    {
        "activation_offloading",
        "cache_implementation",
        "dataset_num_proc",
        "ds3_gather_for_generation",
        "eval_packing",
        "generate_during_eval",
        "log_completions",
        "log_completions_hub_repo",
        "log_multimodal",
        "log_unique_prompts",
        "memory_budget_gb",
        "mlp_tile_tokens",
        "model_init_kwargs",
        "num_completions_to_print",
        "num_generations_eval",
        "optimizer_in_backward",
        "pad_to_multiple_of",
        "padding_free",
        "precompute_ref_batch_size",
        "prefix_sharing",
        "transformers_continuous_batching_config",
        "trust_remote_code",
        "use_transformers_continuous_batching",
        "use_transformers_paged",
    }
)


def describe_run(
    args: Any,
    train_dataset: Any,
    *,
    reference: str | None = None,
    adapters: dict[str, Any] | None = None,
    rewards: list[str] | None = None,
    model: Any = None,
) -> dict[str, Any]:
    """The manifest of a run.

    Args:
        args: the configuration, as the trainer holds it.
        train_dataset: the prepared training data.
        reference: digest of the reference's weights.
        adapters: name -> configuration of each of the policy's adapters (PEFT's `peft_config`).
        rewards: names of the reward functions.
        model: the policy.
    """
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(args) if field.init} - inherited - _NEUTRAL
    own = {name for name in own if not name.startswith("vllm_")}
    objective = {name: _plain(getattr(args, name)) for name in sorted(own | _OBJECTIVE)}
    objective["rows_per_step"] = (
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    objective["adapters"] = {
        name: {k: v for k, v in _plain(config.to_dict()).items() if k not in _NEUTRAL_OF_ADAPTER}
        for name, config in (adapters or {}).items()
    }
    objective["reward_funcs"] = rewards
    return {
        "objective": objective,
        "data": describe_data(train_dataset),
        "reference": {"sha256": reference},
        "model": {} if model is None else describe_model(model, is_first=args.process_index == 0),
        "schedule": {name: _plain(getattr(args, name)) for name in sorted(_SCHEDULE)}
        | {"processes": args.world_size},
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def describe_model(model: Any, *, is_first: bool) -> dict[str, Any]:
    """Architecture, and which base adapters were trained on.

    Args:
        model: a transformers model or `PeftModel`.
        is_first: whether this process has the weights: others may wait for theirs.
    """
    config = _plain(model.config.to_diff_dict()) if hasattr(model, "config") else {}
    return {
        "config": {name: v for name, v in config.items() if name not in _NEUTRAL_OF_MODEL},
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "frozen_sample": _sample_of_frozen(model) if is_first else None,
    }


def _sample_of_frozen(model: Any) -> str | None:
    """SHA-256 of a few values of each frozen weight; None if there are none, or only shards.

    Floats are rounded to bfloat16, so that a base loaded in another precision is the same base.
    """
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen or any(p.is_meta or isinstance(p, DTensor) for _, p in frozen):
        return None
    digest = hashlib.sha256()
    for name, parameter in sorted(frozen):
        # A wrapper that is put around a layer later changes its name.
        digest.update(f"{name.rpartition('.')[2]} {list(parameter.shape)}".encode())
    samples = []
    for _, parameter in sorted(frozen):
        values = parameter.detach().reshape(-1)
        values = values[:: max(1, values.numel() // _SAMPLE)]
        samples.append(values.to(torch.bfloat16) if values.is_floating_point() else values)
    for sample in samples:
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_data(dataset: Any) -> dict[str, Any]:
    """Rows and content of a data set; None for what a stream does not say.

    Reference log-probs computed beforehand are left out: they follow from the rest.
    """
    if not isinstance(dataset, Dataset):
        return {"rows": len(dataset) if isinstance(dataset, Sized) else None, "sha256": None}
    columns = sorted(name for name in dataset.column_names if not name.startswith("ref_"))
    digest = hashlib.sha256(json.dumps(columns).encode())
    for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            _hash_array(digest, batch.column(name).combine_chunks())
    return {"rows": len(dataset), "sha256": digest.hexdigest()}


def _hash_array(digest: Any, array: pa.Array) -> None:
    """Feed values, not buffers: equal rows may lie in memory differently."""
    kind = array.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not array.null_count:
        digest.update(array.value_lengths().to_numpy().astype("<i8").tobytes())
        _hash_array(digest, array.flatten())
    elif (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and not array.null_count:
        digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(json.dumps(array.to_pylist(), sort_keys=True, default=repr).encode())


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Write `fastpost_run.json`."""
    (Path(folder) / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest in a checkpoint, None if it has none."""
    path = Path(folder) / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else None


def differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Where two manifests part, one line each: what forbids a resume, what is worth a warning."""
    # What is read back from JSON has lists for tuples.
    now = json.loads(json.dumps(now))

    def compare(sections: tuple[str, ...]) -> list[str]:
        lines = []
        for section in sections:
            old, new = before.get(section) or {}, now.get(section) or {}
            for name in sorted(old.keys() & new.keys()):
                # None: one of the two could not say (a stream, a reference without weights).
                unknown = section not in ("objective", "schedule") and None in (
                    old[name],
                    new[name],
                )
                if not unknown:
                    lines += _differing(f"{section} {name}", old[name], new[name])
        return lines

    return compare(_STRICT_SECTIONS), compare(_LOOSE_SECTIONS)


def _differing(place: str, old: Any, new: Any) -> list[str]:
    """One line for each value that differs; within dicts by its key."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(old.keys() | new.keys()):
            inner = old.get(name, _ABSENT), new.get(name, _ABSENT)
            lines += _differing(f"{place}.{name}", *inner)
        return lines
    told = ["absent" if value is _ABSENT else repr(value) for value in (old, new)]
    remark = _REMARKS.get(place.rpartition(" ")[2], "")
    return [f"{place}: {told[0]} in the checkpoint, {told[1]} now{remark}"]


def _plain(value: Any) -> Any:
    """A value as JSON holds it; of an object only its class, whose text may hold addresses."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(entry) for entry in value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return type(value).__name__


__all__ = [
    "MANIFEST",
    "describe_data",
    "describe_model",
    "describe_run",
    "differences",
    "read_manifest",
    "write_manifest",
]
