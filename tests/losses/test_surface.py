"""The package re-exports what its files declare, and needs torch alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import fastpost.losses

FILES = sorted(Path(fastpost.losses.__file__).parent.glob("*.py"))


def test_everything_exported_exists_once() -> None:
    names = fastpost.losses.__all__
    assert len(set(names)) == len(names)
    assert all(hasattr(fastpost.losses, name) for name in names)


def test_every_loss_is_exported() -> None:
    declared = {
        name
        for file in FILES
        if file.stem != "__init__"
        for name in importlib.import_module(f"fastpost.losses.{file.stem}").__all__
        if name.endswith("_loss") and name != "preference_loss" and not name.startswith("clipped")
    }
    assert len(declared) > 20
    assert declared <= set(fastpost.losses.__all__)


def test_import_needs_torch_alone() -> None:
    program = (
        "import sys\n"
        "for name in ('transformers', 'trl', 'peft', 'triton', 'fastpost_kernels'):\n"
        "    sys.modules[name] = None  # what makes its import fail\n"
        "import fastpost.losses\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
