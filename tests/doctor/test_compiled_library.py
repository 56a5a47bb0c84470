"""A compiled library that is broken or of another version is named, never called."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from fastpost.cli.main import main
from fastpost_kernels import _csrc, rms_norm
from fastpost_kernels._csrc import BrokenLibrary, open_library

HERE = Path(_csrc.__file__).parent
NAME = f"_csrc_native{EXTENSION_SUFFIXES[0]}"
FOREIGN = importlib.import_module("_ctypes").__file__  # a library without any of our functions


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the package looks for its library now."""
    monkeypatch.setattr(_csrc, "__file__", str(tmp_path / "_csrc.py"))
    caches = (_csrc.library, _csrc._opened)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path / NAME
    for cached in caches:
        cached.cache_clear()


def put(kind: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "no library at all":
        file.write_text("an interrupted download")
    elif kind == "of other functions":
        shutil.copy(FOREIGN, file)
    else:
        shutil.copy(HERE / NAME, file)
        changed = dict(_csrc._SIGNATURES)
        changed["fastpost_transpose_16"] = changed["fastpost_transpose_16"][1:]
        monkeypatch.setattr(_csrc, "_SIGNATURES", changed)


KINDS = {
    "no library at all": "cannot be opened",
    "of other functions": "is of another version: fastpost_simd is missing",
    "of other arguments": "fastpost_transpose_16 takes plllpli there, lllpli here",
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(kind, tmp_path / NAME, monkeypatch)
    with pytest.raises(BrokenLibrary, match=KINDS[kind]):
        open_library(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_doctor_says_so_with_the_fix(
    kind: str, installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(kind, installed, monkeypatch)
    assert main(["doctor", "--json"]) == 0
    found = {f["subject"]: f for f in json.loads(capsys.readouterr().out)}["C++ passes"]
    assert found["status"] == "note"
    assert KINDS[kind] in found["text"] and "CPU training is slower" in found["text"]
    assert "pip install --force-reinstall" in found["fix"]
    assert main(["doctor"]) == 0
    assert "Traceback" not in capsys.readouterr().out


def test_ops_go_on_without_it_and_warn_once(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("of other functions", installed, monkeypatch)
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.warns(RuntimeWarning, match="fastpost_simd is missing.*Fix: python -m pip"):
        y = rms_norm(x, weight, 0.0)
    assert torch.allclose(y.square().mean(-1), torch.ones(3))
    with pytest.raises(ValueError, match="needs the compiled csrc library"):
        rms_norm(x, weight, 0.0, backend="cpp")


def test_nothing_built(installed: Path) -> None:
    assert not installed.exists()
    with pytest.warns(RuntimeWarning, match="not built"):
        assert _csrc.library() is None
    assert _csrc.library_problem() == ("not built", "install from source with a C++ compiler")


def test_the_library_of_another_python_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "_csrc_native.cpython-27-x86_64-linux-gnu.so").write_text("of long ago")
    assert open_library(tmp_path) is None


def test_every_function_wrote_down_its_arguments() -> None:
    """Without the line FASTPOST_ARGUMENTS an older library would be called with other arguments."""
    library = _csrc.library()
    assert library is not None, "build it: pip install -e ."
    missing = [name for name in _csrc._SIGNATURES if _csrc._built_for(library, name) is None]
    assert missing == [], "add FASTPOST_ARGUMENTS(name) after its definition in csrc/"
