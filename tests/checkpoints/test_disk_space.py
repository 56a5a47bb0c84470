"""Checkpoints that do not fit are refused with numbers: before training, and before a save."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastpost.checkpoints import disk_space
from fastpost.checkpoints.disk_space import CheckpointSize, bytes_of, expected_states
from fastpost_kernels import AdamW8bit
from tests.trainers.resumable import build

GIB = 2**30
SHORT = {"max_steps": 3, "save_steps": 1}
SIZE = CheckpointSize(3 * GIB, 6 * GIB)


def with_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(
        disk_space.shutil, "disk_usage", lambda path: SimpleNamespace(free=num_bytes)
    )


@pytest.mark.parametrize(
    ("num_saves", "limit", "at_once"),
    [(1, None, 1), (5, None, 5), (5, 1, 2), (5, 3, 4), (5, 9, 5), (2, 2, 2), (0, None, 0)],
)
def test_what_lies_there_at_once(
    num_saves: int, limit: int | None, at_once: int, tmp_path: Path, monkeypatch: Any
) -> None:
    with_free(monkeypatch, at_once * SIZE.total)
    disk_space.refuse_if_too_many(tmp_path / "new" / "run", SIZE, num_saves, limit)
    if at_once:
        with_free(monkeypatch, at_once * SIZE.total - 1)
        with pytest.raises(ValueError, match=f"{at_once} at once of 9.02 GiB .weights 3.00 GiB, "):
            disk_space.refuse_if_too_many(tmp_path, SIZE, num_saves, limit)


def test_what_is_there_already_counts(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "weights").write_bytes(b"x" * 1000)
    with_free(monkeypatch, 2 * SIZE.total - 1000)
    disk_space.refuse_if_too_many(tmp_path, SIZE, 9, 1)
    with_free(monkeypatch, 2 * SIZE.total - 1001)
    with pytest.raises(ValueError, match="do not fit"):
        disk_space.refuse_if_too_many(tmp_path, SIZE, 9, 1)


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_torch", "adamw_torch_fused"])
def test_expected_states_are_those_the_optimizer_makes(name: str) -> None:
    shapes = ((100,), (4096,), (70, 61), (64, 64, 3))
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    made = AdamW8bit if name == "adamw_8bit" else torch.optim.AdamW
    optimizer: Any = made(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [v for s in optimizer.state.values() for n, v in s.items() if n != "step"]
    assert expected_states(name, parameters) == bytes_of(states)


def test_a_run_that_does_not_fit_is_refused_before_it_trains(
    tmp_path: Path, monkeypatch: Any
) -> None:
    trainer = build("SFT", tmp_path / "run", tmp_path, **SHORT)
    needed = 3 * (3 * bytes_of(trainer.model.parameters()) + 2**24)
    with_free(monkeypatch, needed - 1)
    with pytest.raises(ValueError, match=r"3 at once .* Set save_total_limit=2, fewer saves"):
        trainer.train()
    assert trainer.state.global_step == 0
    with_free(monkeypatch, needed)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("config", "saves"),
    [
        ({"save_steps": 3}, 3),
        ({"save_steps": 0.25, "max_steps": 4}, 4),
        ({"save_strategy": "epoch"}, 3),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, 2),
        ({"save_strategy": "no"}, 0),
    ],
    ids=["steps", "share", "epoch", "epochs", "none"],
)
def test_saves_are_counted(config: dict[str, Any], saves: int, tmp_path: Path) -> None:
    trainer = build("SFT", tmp_path / "run", tmp_path, **config)
    assert trainer._count_saves() == saves
    if config.get("save_steps") == 0.25:
        trainer.train()
        assert len(list((tmp_path / "run").glob("checkpoint-*"))) == saves


def test_a_disk_that_fills_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = build("SFT", tmp_path / "run", tmp_path, **SHORT)
    stock = shutil.disk_usage

    def fills(path: Any) -> Any:
        full = (tmp_path / "run" / "checkpoint-2").exists()
        return SimpleNamespace(free=1000 if full else stock(path).free)

    with monkeypatch.context() as patch:
        patch.setattr(disk_space.shutil, "disk_usage", fills)
        with pytest.raises(ValueError, match=r"next checkpoint takes .* 0.00 GiB are free"):
            trainer.train()
    names = sorted(p.name for p in (tmp_path / "run").glob("[!R]*"))
    assert names == ["checkpoint-1", "checkpoint-2"]
    resumed = build("SFT", tmp_path / "run", tmp_path, **SHORT)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
