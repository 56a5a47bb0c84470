"""A run that is killed and resumed is, bit for bit, the run that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpost.reference_cache import ReferenceStore
from fastpost.trainers.engine_trainer import EngineTrainer
from tests.trainers.resumable import CASES, build, differences

ROOT = Path(__file__).parents[2]
# Methods whose steps depend on more than the one before are killed in every test run.
KILLED = [name for name in ("SFT", "GRPO", "PPO") if name in CASES]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPOST_CACHE", str(tmp_path / "cache"))


def resumed_from(case: str, step: int, tmp_path: Path, whole: Any, **config: Any) -> Any:
    """A fresh trainer that goes on from a checkpoint of `whole`, in a folder of its own."""
    folder = tmp_path / f"resumed-{step}"
    name = f"checkpoint-{step}"
    shutil.copytree(Path(whole.args.output_dir, name), folder / name)
    trainer = build(case, folder, tmp_path, **config)
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_is_the_run_left_alone(case: str, tmp_path: Path) -> None:
    whole = build(case, tmp_path / "whole", tmp_path)
    whole.train()
    # 4 lies within an epoch of three steps and ends one of four, 6 the other way round.
    for step in (4, 6) if case in KILLED else (4,):
        resumed = resumed_from(case, step, tmp_path, whole)
        assert resumed.state.global_step == 8
        for later in range(step + 2, 9, 2):
            folders = (Path(t.args.output_dir, f"checkpoint-{later}") for t in (whole, resumed))
            assert differences(*folders) == [], (step, later)


def carry_out(folder: Path, runs: list[dict[str, Any]], ranks: int = 1) -> list[int]:
    """Exit statuses of runs in processes of their own; each run on so many ranks."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if ranks > 1:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
            values = (rank, rank, ranks, ranks, port)
            environment |= {"MASTER_ADDR": "127.0.0.1"}
            environment |= dict(zip(names, map(str, values), strict=True))
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.trainers.resumable", str(file)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=(folder / f"errors-{rank}.txt").open("w"),
                text=True,
            )
        )
    statuses = []
    for rank, process in enumerate(started):
        output, _ = process.communicate(timeout=540)
        assert process.returncode == 0, (folder / f"errors-{rank}.txt").read_text()[-4000:]
        statuses.append(json.loads(output.splitlines()[-1]))
    assert all(other == statuses[0] for other in statuses)
    return statuses[0]


def runs_killed_twice(case: str) -> list[dict[str, Any]]:
    """Killed while it saves step 4, then after step 7, then left to its end; and left alone."""
    shared = {"case": case, "name": f"{case}-killed"}
    return [
        shared | {"kill_at": "in-save:4", "resume": False},
        shared | {"kill_at": "after-step:7", "resume": True},
        shared | {"kill_at": None, "resume": True},
        {"case": case, "name": f"{case}-whole", "kill_at": None, "resume": False},
    ]


def assert_same_end(case: str, folder: Path) -> None:
    killed, whole = folder / f"{case}-killed", folder / f"{case}-whole"
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())
    for step in (2, 4, 6, 8):
        name = f"checkpoint-{step}"
        assert differences(whole / name, killed / name) == [], (case, name)


def test_killed_runs_end_as_runs_left_alone(tmp_path: Path) -> None:
    """Killed in a save, between saves, and while reference log-probs are computed."""
    runs = [run for case in KILLED for run in runs_killed_twice(case)]
    cached = {"case": "DPO-cached", "resume": False}
    runs += [
        cached | {"name": "first", "kill_at": "in-reference:2"},
        cached | {"name": "second", "kill_at": None},
    ]
    statuses = carry_out(tmp_path, runs)
    killed = -signal.SIGKILL
    assert statuses == [killed, killed, 0, 0] * len(KILLED) + [killed, 0]
    for case in KILLED:
        assert_same_end(case, tmp_path)
    # 24 rows in forwards of 8: two forwards in the first process, the rest in the second.
    logs = sorted((tmp_path / "cache").rglob("rows-*.log"), key=lambda p: p.stat().st_mtime)
    assert [len(ReferenceStore(p.parent).read()) for p in logs[-1:]] == [24]
    assert [p.stat().st_size * 24 // sum(q.stat().st_size for q in logs) for p in logs] == [16, 8]


@pytest.mark.slow(minutes=3)
def test_every_method_survives_being_killed(tmp_path: Path) -> None:
    statuses = carry_out(tmp_path, [run for case in CASES for run in runs_killed_twice(case)])
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 0, 0] * len(CASES)
    for case in CASES:
        assert_same_end(case, tmp_path)


@pytest.mark.slow(minutes=3)
def test_killed_run_of_two_processes_ends_as_the_run_left_alone(tmp_path: Path) -> None:
    statuses = carry_out(tmp_path, runs_killed_twice("DPO-cached"), ranks=2)
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]
    assert_same_end("DPO-cached", tmp_path)
    last = {p.name for p in (tmp_path / "DPO-cached-killed" / "checkpoint-8").iterdir()}
    assert {f"fastpost_state_{rank}.json" for rank in range(2)} <= last
    assert {f"rng_state_{rank}.pth" for rank in range(2)} <= last


def last_differences(one: Any, other: Any) -> list[str]:
    return differences(*(Path(t.args.output_dir, "checkpoint-8") for t in (one, other)))


def test_a_difference_would_be_noticed(tmp_path: Path) -> None:
    whole = build("SFT", tmp_path / "whole", tmp_path)
    whole.train()
    with pytest.warns(match="lr_scheduler_type"):
        other = resumed_from("SFT", 6, tmp_path, whole, lr_scheduler_type="constant")
    found = last_differences(whole, other)
    for part in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert any(line.startswith(part) for line in found), found


@pytest.mark.parametrize(
    ("case", "left_out"),
    [
        ("GRPO", ("engine_trainer._HELD_BETWEEN_STEPS", ())),
        ("RLOO", ("engine_trainer._HELD_BETWEEN_STEPS", ())),
        (
            "SFT-by-length",
            ("engine_trainer.EngineTrainer._mark_epoch_start", EngineTrainer._random_state),
        ),
    ],
    ids=["rollouts-grpo", "rollouts-rloo", "order-of-rows"],
)
def test_what_a_checkpoint_carries_is_needed(
    case: str, left_out: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out, the resumed run samples anew or orders the epoch anew: another run."""
    monkeypatch.setattr(EngineTrainer, "_epoch_start", {"torch": None, "sampler": None}, False)
    monkeypatch.setattr(f"fastpost.trainers.{left_out[0]}", left_out[1])
    whole = build(case, tmp_path / "whole", tmp_path)
    whole.train()
    found = last_differences(whole, resumed_from(case, 4 if "SFT" in case else 6, tmp_path, whole))
    assert any(line.startswith("model.safetensors") for line in found), found


def test_reported_loss_is_of_the_steps_of_this_call(tmp_path: Path) -> None:
    whole = build("SFT", tmp_path / "whole", tmp_path, logging_steps=1)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    resumed = resumed_from("SFT", 4, tmp_path, whole, logging_steps=1)
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses[4:]) / 4)
