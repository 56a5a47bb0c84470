"""A checkpoint has its name only when it is whole, and state survives the disk bit for bit."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from transformers.trainer_utils import get_last_checkpoint

from fastpost.checkpoints import (
    SAVING,
    atomic,
    last_complete_checkpoint,
    publish,
    publish_files,
    read_state,
    recover,
    rotate,
    write_state,
)
from tests.trainers import methods
from tests.trainers.conftest import tiny_model
from tests.trainers.resumable import build


class Stopped(BaseException):
    """Stands for the end of the process: nothing that handles errors catches it."""


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_text(content)
    return path


def contents(path: Path) -> dict[str, str]:
    return {str(f.relative_to(path)): f.read_text() for f in path.rglob("*") if f.is_file()}


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """End the process at the nth call of a function of `os`."""
    stock, calls = getattr(os, name), []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise Stopped
        return stock(*args, **kwargs)

    monkeypatch.setattr(atomic.os, name, stopping)


def test_published_folder_has_its_name_and_files(tmp_path: Path) -> None:
    staged = folder_with(tmp_path / SAVING / "checkpoint-4", weights="new", state="s")
    publish(staged, tmp_path / "checkpoint-4")
    assert contents(tmp_path) == {"checkpoint-4/weights": "new", "checkpoint-4/state": "s"}


@pytest.mark.parametrize("call", [1, 2])
def test_replacing_a_checkpoint_never_loses_it(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = folder_with(tmp_path / "checkpoint-4", weights="old", extra="x")
    staged = folder_with(tmp_path / SAVING / "checkpoint-4", weights="new")
    with monkeypatch.context() as patch:
        stop_at(patch, "rename", call)
        with pytest.raises(Stopped):
            publish(staged, old)
    told = recover(tmp_path)
    assert contents(tmp_path) == {"checkpoint-4/weights": "old", "checkpoint-4/extra": "x"}
    assert (call == 2) == any("put back checkpoint-4" in line for line in told)
    publish(folder_with(tmp_path / SAVING / "checkpoint-4", weights="new"), old)
    recover(tmp_path)
    assert contents(tmp_path) == {"checkpoint-4/weights": "new"}


def test_recover_removes_what_is_half_there(tmp_path: Path) -> None:
    folder_with(tmp_path / SAVING / "checkpoint-6", weights="half")
    folder_with(tmp_path / "checkpoint-4", weights="whole")
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    assert recover(tmp_path) == ["removed the unfinished checkpoint-6"]
    assert contents(tmp_path) == {"checkpoint-4/weights": "whole"}
    assert recover(tmp_path) == [] == recover(tmp_path / "never made")


def test_every_file_is_flushed_before_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = folder_with(tmp_path / SAVING / "checkpoint-4", a="1")
    folder_with(staged / "optimizer_0", b="2")
    everything = {str(path) for path in (staged, *staged.rglob("*"))}
    order: list[str] = []
    stock_fsync, stock_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        stock_fsync(descriptor)

    def rename(*names: Any) -> None:
        order.append("rename")
        stock_rename(*names)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    monkeypatch.setattr(atomic.os, "rename", rename)
    publish(staged, tmp_path / "checkpoint-4")
    assert set(order[: order.index("rename")]) == everything
    assert order[-1] == str(tmp_path)


def test_saved_files_replace_older_ones_whole(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path / "out",
        **{
            "config.json": "old",
            "model-00001-of-00002.safetensors": "old",
            "model-00002-of-00002.safetensors": "old",
            "model.safetensors.index.json": "old",
            "notes.txt": "kept",
            "adapter_model.safetensors": "kept",
        },
    )
    staged = folder_with(
        folder / SAVING / "model", **{"config.json": "new", "model.safetensors": "new"}
    )
    publish_files(staged, folder)
    assert contents(folder) == {
        "config.json": "new",
        "model.safetensors": "new",
        "notes.txt": "kept",
        "adapter_model.safetensors": "kept",
    }


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        folder_with(tmp_path / f"checkpoint-{step}", weights=str(step))
        os.utime(tmp_path / f"checkpoint-{step}", (1000 + step * 100,) * 2)
    rotate(tmp_path, None, None)
    rotate(tmp_path, 0, None)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-8"}
    rotate(tmp_path, 1, str(tmp_path / "checkpoint-2"))
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-8"}
    rotate(tmp_path, 1, None)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_rotation_never_half_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4):
        folder_with(tmp_path / f"checkpoint-{step}", a="1", b="2")
        os.utime(tmp_path / f"checkpoint-{step}", (1000 + step * 100,) * 2)

    def stop(path: Any, **_: Any) -> None:
        next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(
            atomic.shutil, "rmtree", lambda path, **options: None if options else stop(path)
        )
        with pytest.raises(Stopped):
            rotate(tmp_path, 1, None)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    recover(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4"]


def test_half_written_checkpoints_of_others_are_passed_over(tmp_path: Path) -> None:
    folder_with(tmp_path / "checkpoint-4", **{"trainer_state.json": "{}"})
    folder_with(tmp_path / "checkpoint-10", **{"model.safetensors": "half"})
    folder_with(
        tmp_path / "checkpoint-6",
        **{"trainer_state.json": "{}", "checkpoint-is-incomplete.txt": "saving"},
    )
    assert last_complete_checkpoint(tmp_path) == (
        str(tmp_path / "checkpoint-4"),
        ["checkpoint-10", "checkpoint-6"],
    )
    assert last_complete_checkpoint(tmp_path / "never made") == (None, [])


def test_state_survives_the_disk(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "float": 0.1 + 0.2,
        "infinite": math.inf,
        "none": None,
        "flag": True,
        "nested": [{"a": (1, "x")}, []],
        "views": [shared[:3], shared.view(2, 3).T],
        "half": torch.tensor([1.1, -0.0], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
    }
    write_state(tmp_path, state, 1)
    assert read_state(tmp_path, 0) is None
    back = read_state(tmp_path, 1)
    assert back is not None and back.keys() == state.keys()
    for name in ("float", "infinite", "none", "flag", "nested"):
        assert back[name] == state[name] and type(back[name]) is type(state[name])
    for name in ("half", "mask", "scalar"):
        assert torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype
    assert all(torch.equal(a, b) for a, b in zip(back["views"], state["views"], strict=True))
    assert not any(p.suffix in (".pt", ".pkl", ".bin") for p in tmp_path.iterdir())


def test_state_of_another_kind_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.rows\[1\] is a set"):
        write_state(tmp_path, {"rows": [1, {2}]})


def test_no_pickle_is_ever_loaded() -> None:
    """What the docstring says of transformers, read in its source."""
    source = Path(transformers.trainer.__file__).read_text()
    loads = source.split("torch.load(")[1:]
    assert len(loads) >= 6
    assert all("weights_only=True" in load[:300] for load in loads)


# In trainers.


def test_best_checkpoint_is_known_by_its_final_name(tmp_path: Path) -> None:
    trainer = build(
        "SFT",
        tmp_path / "run",
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=1,
        max_steps=4,
    )
    trainer.train()
    best = str(tmp_path / "run" / "checkpoint-4")
    assert trainer.state.best_model_checkpoint == best
    state = json.loads(Path(best, "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["README.md", "checkpoint-4"]


@pytest.mark.parametrize("only_model", [False, True], ids=["whole", "model-only"])
def test_a_checkpoint_holds_the_stock_files_and_ours(only_model: bool, tmp_path: Path) -> None:
    settings = {"max_steps": 1, "save_steps": 1, "save_only_model": only_model}
    ours = build("SFT", tmp_path / "ours", tmp_path, **settings)
    ours.train()
    stock = trl.SFTTrainer(
        tiny_model(len(methods.tokenizer())),
        args=trl.SFTConfig(
            **methods.settings_of(methods.METHODS["SFT"], tmp_path / "stock", **settings)
            | {"save_strategy": "steps"}
        ),
        train_dataset=methods.prompt_completion_rows(),
        processing_class=methods.tokenizer(),
    )
    stock.train()
    mine, theirs = (
        {p.name for p in (tmp_path / name / "checkpoint-1").iterdir()} for name in ("ours", "stock")
    )
    added = {"fastpost_run.json", "fastpost_template.json"}
    if not only_model:
        added |= {"fastpost_state_0.json", "fastpost_state_0.safetensors"}
    assert mine == theirs | added


def test_uploads_start_from_the_final_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[str, bool]] = []

    def push(self: Any, folder: str) -> None:
        pushed.append((folder, Path(folder, "trainer_state.json").is_file()))

    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", push)
    trainer = build("SFT", tmp_path / "run", tmp_path, max_steps=2)
    trainer.args.push_to_hub = True
    trainer.hub_model_id, trainer.push_in_progress = "someone/model", None
    trainer.train()
    assert pushed == [(str(tmp_path / "run" / "checkpoint-2"), True)]


def test_a_save_that_fails_leaves_the_older_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build("SFT", tmp_path / "run", tmp_path, save_strategy="no")
    trainer.save_model()
    path = tmp_path / "run" / "model.safetensors"
    before = path.read_bytes()

    def half(output_dir: str, **_: Any) -> None:
        Path(output_dir, "model.safetensors").write_bytes(before[:100])
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "save_pretrained", half)
        with pytest.raises(Stopped):
            trainer.save_model()
    assert path.read_bytes() == before
    with torch.no_grad():
        trainer.model.lm_head.weight += 1
    trainer.save_model()
    assert path.read_bytes() != before
    assert not (tmp_path / "run" / SAVING).exists()


def test_just_in_time_checkpoints_are_whole_too(tmp_path: Path) -> None:
    trainer = build("SFT", tmp_path / "run", tmp_path, max_steps=3, save_strategy="no")
    sentinel = folder_with(
        tmp_path / "run" / "checkpoint-3", **{"checkpoint-is-incomplete.txt": "saving"}
    )
    trainer.train()
    trainer._save_checkpoint(trainer.model, trial=None)
    assert last_complete_checkpoint(tmp_path / "run") == (str(sentinel), [])


def test_resuming_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = build("SFT", tmp_path / "run", tmp_path)
    folder_with(tmp_path / "run" / "checkpoint-2", **{"model.safetensors": "half"})
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "run")
