"""`fastpost tune` with a CPU in a GPU's place, and what `fastpost doctor` says afterwards."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpost.cli.main import main
from fastpost.doctor.environment import environment
from fastpost.tune.subjects import Subject
from fastpost.tune.tuner import GpuLost
from fastpost_kernels import _choices, _device
from fastpost_kernels._choices import choices_file, choose, forget, read, save

command = importlib.import_module("fastpost.cli.tune")
stopwatch = importlib.import_module("fastpost.tune.stopwatch")
subject_module = importlib.import_module("fastpost.tune.subjects")
tuner = importlib.import_module("fastpost.tune.tuner")

CPU = torch.device("cpu")
DEVICE = "NVIDIA Test 9000"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTPOST_CACHE", str(tmp_path))
    forget()
    yield
    forget()


def two_subjects() -> list[Subject]:
    """Each option runs as long as its name says; the second shape does not fit the GPU."""

    def make(device: torch.device) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(3, device=device)}

    def fails(device: torch.device) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def run(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        option = choose("head_tile", CPU, "any")
        return {"x": given["x"] * (2 if option == "8192x2048" else 1)}

    plain = (torch.float32, make, run, dict, dict)
    first = Subject("head_tile", "H1-V1-float32", "M 1, H 1, V 1", *plain)
    return [first, replace(first, choice="head_fold", title="M 9, H 9, V 9", make=fails)]


class Clock:
    """Fewer rows and columns are faster."""

    def __init__(self, device: torch.device) -> None:
        assert device == CPU

    def medians(self, runs: Sequence[Callable[[], object]]) -> list[float]:
        found = []
        for run in runs:
            run()
            found.append(self.last)
        return found

    last = 0.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _choices.override
    sizes = {"4096x4096": 2e-3, "2048x4096": 1.5e-3, "8192x4096": 3e-3, "4096x2048": 1e-3}

    def watched(options: dict[str, str]) -> Any:
        Clock.last = sizes.get(options.get("head_tile", ""), 9.0)
        return real(options)

    monkeypatch.setattr(tuner, "override", watched)
    monkeypatch.setattr(stopwatch, "CudaStopwatch", Clock)
    monkeypatch.setattr(subject_module, "subjects", two_subjects)
    monkeypatch.setattr(command, "_gpus", lambda: [CPU])
    monkeypatch.setattr(_choices, "device_name", lambda _: DEVICE)
    monkeypatch.setattr(_device, "triton_is_interpreted", lambda: False)


@pytest.mark.usefixtures("gpu")
def test_the_report_says_what_was_gained_and_where_it_is(capsys: pytest.CaptureFixture) -> None:
    assert main(["tune"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 100  # the last is a path
    text = " ".join(" ".join(lines).split())
    assert "head_tile M 1, H 1, V 1: 4096x4096 2 ms; 2048x4096 1.5 ms (-25.0%)" in text
    assert "4096x2048 1 ms (-50.0%)" in text and "-> 4096x2048" in text
    assert "8192x2048 left out, x is wrong: error" in text
    assert "head_fold M 9, H 9, V 9: not measured, tiles stays; OutOfMemoryError" in text
    assert f"{DEVICE}: 1 of 1 measured choices changed, which saves 50.0% to 50.0%" in text
    assert "1 shapes could not be measured" in text and str(choices_file(DEVICE)) in text
    assert choose("head_tile", CPU, "H1-V1-float32") == "4096x2048"
    assert read(DEVICE).table == {"head_tile": {"H1-V1-float32": "4096x2048"}}


@pytest.mark.usefixtures("gpu")
def test_json_and_the_file_hold_the_measurements(capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device["device"] == DEVICE and device["path"] == str(choices_file(DEVICE))
    first, second = device["outcomes"]
    assert first["chosen"] == "4096x2048" and first["trials"][2]["seconds"] == 1e-3
    assert second["chosen"] == "tiles" and "out of memory" in second["fault"]
    stored = json.loads(choices_file(DEVICE).read_text())
    assert stored["measured"] == device["outcomes"]


@pytest.mark.usefixtures("gpu")
def test_a_lost_gpu_stores_nothing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> Iterator[None]:
        raise GpuLost("illegal access")
        yield

    monkeypatch.setattr(tuner, "tune", lost)
    assert main(["tune"]) == 1
    assert "nothing was stored: illegal access" in capsys.readouterr().out
    assert not choices_file(DEVICE).exists()


def test_reset_removes_every_file(capsys: pytest.CaptureFixture) -> None:
    paths = [save(name, {}, []) for name in ("One", "Two")]
    assert main(["tune", "--reset"]) == 0
    assert capsys.readouterr().out.startswith("Removed 2 files")
    assert not any(path.exists() for path in paths)
    assert main(["tune", "--reset", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": []}


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_without_a_gpu_one_sentence(
    flags: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *flags]) == 0
    out = capsys.readouterr().out
    message = json.loads(out)["message"] if flags else out.strip()
    assert message == "There is no GPU that torch can use, so nothing was measured."


@pytest.mark.usefixtures("gpu")
def test_an_interpreter_is_not_measured(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_device, "triton_is_interpreted", lambda: True)
    assert main(["tune"]) == 0
    assert capsys.readouterr().out.startswith("TRITON_INTERPRET is set")
    assert not choices_file(DEVICE).exists()


def test_an_unknown_flag_is_a_usage_error(capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", "--quick"]) == 2
    assert "tune takes --json and --reset, got --quick" in capsys.readouterr().err
    assert main(["tune", "--help"]) == 0
    assert "--reset" in capsys.readouterr().out


def test_the_doctor_names_the_file_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(_choices, "device_name", lambda _: DEVICE)
    path = choices_file(DEVICE)

    def tuned() -> Any:
        (finding,) = [f for f in environment() if f.subject == "tuned"]
        return finding

    assert tuned().status == "note" and "nothing was measured" in tuned().text
    save(DEVICE, {"head_tile": {"a": "8192x4096", "b": "2048x4096"}}, [])
    assert tuned().status == "ok"
    assert tuned().text == f"2 measured choices on {DEVICE}, from {path}"
    path.write_text("{")
    assert tuned().status == "note" and tuned().fix == "fastpost tune"
    assert f"defaults on {DEVICE}: {path} cannot be read" in tuned().text
