"""The folder `kernels/` must never be mistaken for the PyPI package `kernels`, nor tests for ours.

A regular package in `kernels/` would hide Hugging Face's library of that name from transformers,
and a test folder called like one of our packages would become an empty package of that name.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = {"kernels", "fastpost", "fastpost_kernels"}


def test_kernels_is_no_python_package() -> None:
    names = {path.name for path in (ROOT / "kernels").iterdir()}
    assert "torch-ext" in names
    assert names.isdisjoint({"__init__.py", "pyproject.toml", "setup.py", "tests"})


def test_hub_files_the_builder_generates_are_not_here() -> None:
    assert list((ROOT / "kernels").rglob("_ops.py")) == []


def test_import_kernels_is_the_pypi_package() -> None:
    spec = find_spec("kernels")
    assert spec is not None and spec.origin is not None
    assert not Path(spec.origin).is_relative_to(ROOT / "kernels")
    assert version("kernels")


def test_no_test_or_bench_folder_is_called_like_a_package() -> None:
    folders = [
        path
        for top in ("tests", "bench")
        for path in (ROOT / top).rglob("*")
        if path.is_dir() and path.name in OURS
    ]
    assert folders == []
