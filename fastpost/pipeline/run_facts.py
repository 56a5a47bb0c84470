"""What ran: versions, configuration, data, kernel choices, git state, machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fastpost
from fastpost.pipeline.recipe import Pipeline
from fastpost_kernels import _choices

__all__ = ["run_facts"]

_LIBRARIES = (
    "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors",
    "bitsandbytes", "vllm", "lm_eval", "reasoning-gym",
)  # fmt: skip


def run_facts(pipeline: Pipeline, is_smoke: bool) -> dict[str, Any]:
    """The manifest of a run as it starts; stages add their own (`stage.json`)."""
    return {
        "pipeline": dataclasses.asdict(pipeline),
        "smoke": is_smoke,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"fastpost": fastpost.__version__, "python": platform.python_version()}
        | _versions(),
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "kernels": _kernel_choices(),
        "git": _git_state(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _kernel_choices() -> dict[str, Any]:
    """Defaults, or what `fastpost tune` measured to be faster on this GPU."""
    if not torch.cuda.is_available():
        return {"device": "cpu", "choices": "defaults: a CPU has no others"}
    file = _choices.choices_file(torch.cuda.get_device_name())
    try:
        chosen: Any = json.loads(file.read_text())["choices"]
    except (OSError, ValueError, KeyError):
        chosen = "defaults: not tuned"
    return {"device": torch.cuda.get_device_name(), "choices": chosen}


def _git_state() -> dict[str, Any] | None:
    """Commit and changed files of the repository that the run is started in; None outside one."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=30, check=True, cwd=Path.cwd()
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--short").split("\n")}
    except (OSError, subprocess.SubprocessError):
        return None
