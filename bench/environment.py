"""What a number was measured on: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "liger-kernel",
    "bitsandbytes",
)
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def describe(module: str) -> dict[str, Any]:
    """Facts to store beside a result of `python -m <module>`."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "versions": versions,
    }


def _processor() -> str:
    """Model and the vector instructions that decide the speed of bf16."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = set(facts.get("flags", "").split())
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags]
    return f"{facts.get('model name', platform.processor())} ({', '.join(units)})"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


__all__ = ["RESULTS", "ROOT", "describe"]
