"""`fastpost doctor` with faked packages and kernels."""

from __future__ import annotations

import importlib.metadata
import json
from types import SimpleNamespace

import pytest
import torch

from fastpost.cli.main import main
from fastpost.doctor import environment, kernel_checks
from fastpost.doctor.kernel_checks import CheckResult
from fastpost_kernels import _csrc, _device


@pytest.mark.parametrize(("package", "code"), [("trl", 1), ("vllm", 0)])
def test_a_missing_package(package, code, monkeypatch, capsys) -> None:
    def version(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return sound(name) if name not in environment.OPTIONAL else "0.0"

    sound = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor", "--json"]) == code
    found = {f["subject"]: f for f in json.loads(capsys.readouterr().out)}
    assert found[package]["status"] == ("problem" if code else "note")
    assert "missing: needed for" in found[package]["text"]
    assert "python -m pip install" in found[package]["fix"]
    assert found["bitsandbytes"]["status"] == "note"  # 0.0 is out of its range


def test_text_fits_100_columns(capsys) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("simd", "said"), [(0, "portable"), (1, "AVX2"), (2, "AVX-512"), (3, "AMX for bf16 attention")]
)
def test_the_path_of_the_cpu_is_said(simd, said, capsys, monkeypatch) -> None:
    monkeypatch.setattr(_csrc, "library", lambda: SimpleNamespace(fastpost_simd=lambda: simd))
    monkeypatch.setattr(_csrc, "library_problem", lambda: None)
    assert main(["doctor", "--json"]) == 0
    found = {f["subject"]: f for f in json.loads(capsys.readouterr().out)}
    assert found["C++ passes"]["text"].startswith(f"built, uses {said}")


def test_no_gpu_is_said_plainly(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--gpu"]) == 0
    assert capsys.readouterr().out.startswith("There is no GPU")


def test_the_interpreter_on_a_gpu_is_said_plainly(capsys, monkeypatch) -> None:
    """Tests run with TRITON_INTERPRET=1: the kernels would be checked on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_checks, "run_checks", lambda device: 1 / 0)
    assert main(["doctor", "--gpu"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("No kernel was checked: TRITON_INTERPRET is set")
    assert said.endswith("Fix: unset TRITON_INTERPRET, then start again")
    assert main(["doctor", "--gpu", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"] == []
    assert "unset TRITON_INTERPRET" in str(environment.interpreter()[0].fix)


@pytest.mark.parametrize("fault", [None, "wrote outside a buffer"])
def test_exit_code_of_kernel_checks(fault, capsys, monkeypatch) -> None:
    result = CheckResult("op", "form", "fp32", "M=1", "out", 1e-7, 1e-6, fault)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_device, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(kernel_checks, "run_checks", lambda device: [result])
    assert main(["doctor", "--gpu"]) == int(fault is not None)
    assert ("FAIL" in capsys.readouterr().out) == (fault is not None)
