"""A stage as a process: its command line, the files it reads, what it leaves.

folder/config.yaml     the fields of a training command, or of `fastpost mix`
folder/job.json        a stage that is no command of its own (loops, evaluations)
folder/model, rows.jsonl   what the stage makes
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpost.checkpoints import last_complete_checkpoint
from fastpost.data.row_files import whole_file
from fastpost.pipeline.digests import local_path
from fastpost.pipeline.recipe import LOOP_KINDS, RecipeError, Stage

__all__ = ["command_of", "gpu_count", "output_of", "work_command", "write_json"]

CLI = [sys.executable, "-m", "fastpost.cli.main"]
_NPROC = re.compile(r"^(\d+)x")

# Field of a decontaminate stage -> flag of `fastpost decontaminate`.
_DECONTAMINATE = (
    "n", "by", "model", "action", "columns", "against_columns", "split", "against_split",
    "processes",
)  # fmt: skip


def output_of(stage: Stage, folder: Path) -> Path:
    """Where the stage leaves what it makes; a loop's result says which model it chose."""
    return folder / "rows.jsonl" if stage.makes_rows else folder / "model"


def command_of(
    stage: Stage, fields: Mapping[str, Any], folder: Path, gpus: str | None
) -> list[str]:
    """The command line of a stage, after writing the files it reads.

    Args:
        stage: of a kind that makes something.
        fields: its fields, with paths in the place of references.
        folder: of the stage.
        gpus: a training stage gets a process for each.

    Raises:
        RecipeError: a field is missing or unknown.
    """
    output = output_of(stage, folder)
    if stage.kind == "decontaminate":
        return _decontaminate(fields, output, stage.name)
    if stage.kind == "mix":
        _write_yaml(folder / "config.yaml", {**fields, "sources": _absolute(fields.get("sources"))})
        return [*CLI, "mix", str(folder / "config.yaml"), "--output", str(output)]
    if stage.kind == "merge":
        return _merge(fields, output, stage.name)
    if stage.kind == "export":
        return _export(fields, output)
    if stage.kind in LOOP_KINDS:
        job = {"work": "loop", "loop": stage.kind, "folder": str(folder / "loop"), **fields}
        return work_command(folder, job)
    return _train(stage, fields, folder, output, gpus)


def work_command(folder: Path, job: Mapping[str, Any]) -> list[str]:
    """A process that does `job`, which is written to `folder/job.json`."""
    write_json(folder / "job.json", job)
    return [*CLI, "run", "--work", str(folder / "job.json")]


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def gpu_count(gpus: str | None) -> int:
    """8 of `8xH100-80GB`; 1 without a count."""
    found = _NPROC.match(gpus or "")
    return int(found[1]) if found else 1


def _train(
    stage: Stage, fields: Mapping[str, Any], folder: Path, output: Path, gpus: str | None
) -> list[str]:
    config = {"report_to": "none", "logging_steps": 1, "record": True, **fields}
    config["output_dir"] = str(output)
    checkpoint = last_complete_checkpoint(output)[0] if output.is_dir() else None
    if checkpoint is not None:
        config["resume_from_checkpoint"] = str(checkpoint)
    _write_yaml(folder / "config.yaml", config)
    command = CLI
    if gpu_count(gpus) > 1:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(gpu_count(gpus)), "-m", "fastpost.cli.main"),
        ]
    return [*command, stage.method, "--config", str(folder / "config.yaml")]


def _decontaminate(fields: Mapping[str, Any], output: Path, name: str) -> list[str]:
    known = ("train", "against", *_DECONTAMINATE)
    for field in fields:
        if field not in known:
            raise RecipeError(f"stage {name}: unknown {field!r}. Known: {', '.join(known)}")
    against = fields.get("against")
    if not isinstance(fields.get("train"), str) or not against:
        raise RecipeError(f"stage {name}: needs `train: FILE` and `against: [FILE, ...]`")
    argv = [*CLI, "decontaminate", fields["train"], "--output", str(output)]
    for evaluation_set in [against] if isinstance(against, str) else against:
        argv += ["--against", evaluation_set]
    for field in _DECONTAMINATE:
        if field in fields:
            value = fields[field]
            words = value if isinstance(value, list) else [value]
            argv += [f"--{field.replace('_', '-')}", *map(str, words)]
    return argv


def _merge(fields: Mapping[str, Any], output: Path, name: str) -> list[str]:
    how = fields["how"]
    taken = {
        "adapter": {"model", "adapter", "base", "into", "max_kl", "prompts"},
        "mean": {"models"},
        "interpolate": {"first", "second", "t", "spherical"},
        "task": {"base_model", "models", "factors"},
    }[how]
    unknown = sorted(set(fields) - taken - {"how"})
    needed = taken - {"base", "into", "max_kl", "prompts", "spherical"}
    missing = sorted(needed - set(fields))
    if unknown or missing:
        raise RecipeError(
            f"stage {name}: merge {how} takes {', '.join(sorted(taken))}; unknown: "
            f"{', '.join(unknown) or 'none'}, missing: {', '.join(missing) or 'none'}"
        )
    argv = [*CLI, "merge", how]
    if how == "adapter":
        argv += [fields["model"], fields["adapter"], str(output)]
        for field in ("base", "into", "max_kl", "prompts"):
            if field in fields:
                argv += [f"--{field.replace('_', '-')}", str(fields[field])]
        return argv
    if how == "mean":
        argv += fields["models"]
    elif how == "interpolate":
        argv += [fields["first"], fields["second"], "--t", str(fields["t"])]
        argv += ["--spherical"] * bool(fields.get("spherical"))
    else:
        argv += [fields["base_model"], *fields["models"]]
        argv += ["--factors", *map(str, fields["factors"])]
    return [*argv, "--output", str(output)]


def _export(fields: Mapping[str, Any], output: Path) -> list[str]:
    """A whole model is linked file by file; the shards of a checkpoint are put together."""
    model = Path(fields["model"])
    if any(model.glob("*.safetensors")):
        job = {"work": "link", "model": str(model), "output": str(output)}
        return work_command(output.parent, job)
    checkpoint = last_complete_checkpoint(model)[0]
    if checkpoint is None:
        raise RecipeError(f"export: {model} holds neither weights nor a checkpoint of a training")
    return [*CLI, "export", str(checkpoint), str(output)]


def _absolute(sources: Any) -> Any:
    """`fastpost mix` reads names relative to its recipe, which lies in the stage's folder."""

    def full(data: Any) -> Any:
        path = local_path(data) if isinstance(data, str) else None
        return data if path is None else str(path.resolve())

    if not isinstance(sources, dict):
        return sources
    return {
        name: full(source)
        if isinstance(source, str)
        else {**source, "data": full(source.get("data"))}
        for name, source in sources.items()
    }


def _write_yaml(path: Path, fields: Mapping[str, Any]) -> None:
    """Fields as YAML that every command reads: one JSON value a line."""
    with whole_file(path) as file:
        for name, value in fields.items():
            file.write(f"{name}: {json.dumps(value, ensure_ascii=False)}\n".encode())
