"""Importing a layer must not import the layers and libraries above it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "matplotlib"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("fastpost", HEAVY | {"torch", "numpy"}),
        ("fastpost_kernels", HEAVY | {"fastpost", "kernels", "safetensors"}),
        ("fastpost.packing", HEAVY),
        ("fastpost.cli.main", HEAVY | {"torch", "numpy"}),
    ],
)
def test_import_is_lean(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert module in loaded
    assert unwanted & set(loaded) == set()
