"""The progress display: what it says, how often, and on which step."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as StockProgressCallback

from fastpost import progress
from fastpost.progress import ProgressCallback, use_progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "peak_memory_bytes", lambda: 3 * 2**29)
    return clock


def make_engine() -> Any:
    stats = SimpleNamespace(padded_tokens=500, row_tokens=300, unique_tokens=200, scored_tokens=50)
    return SimpleNamespace(stats=stats)


class Run:
    """Drives a callback as the Trainer does: begin, step, log, and so on."""

    def __init__(self, callback: ProgressCallback, max_steps: int, **state: Any) -> None:
        self.callback = callback
        self.args = SimpleNamespace(disable_tqdm=state.pop("disable_tqdm", False))
        state = {"global_step": 0, "is_world_process_zero": True} | state
        self.state = SimpleNamespace(max_steps=max_steps, **state)
        self.tell("on_train_begin")

    def tell(self, event: str, **kwargs: Any) -> None:
        getattr(self.callback, event)(self.args, self.state, None, **kwargs)

    def step(self, clock: Clock, seconds: float, logs: dict[str, float] | None = None) -> None:
        self.tell("on_step_begin")
        clock.now += seconds
        stats = self.callback.engine.stats
        stats.padded_tokens += 1000
        stats.row_tokens += 800
        stats.unique_tokens += 400
        self.state.global_step += 1
        self.tell("on_step_end")
        if logs is not None:
            self.tell("on_log", logs=logs)


def test_line_tells_the_figures_of_its_step(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(ProgressCallback("dpo", make_engine()), max_steps=31)
    run.step(clock, 2.0, {"loss": 0.6931, "rewards/margins": 0.25, "learning_rate": 1e-6})
    run.tell("on_step_begin")
    assert capsys.readouterr().out == (
        "dpo step 1/31 | ETA 0:01:00 | 400 tokens/s | 60% of padded tokens saved | peak 1.50 GiB"
        " | loss 0.6931 | rewards/margins 0.25\n"
    )


def test_lines_come_at_the_first_and_last_step_and_at_most_every_interval(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(ProgressCallback("sft", make_engine(), line_interval_s=5.0), max_steps=12)
    for _ in range(12):
        run.step(clock, 2.0)
    run.tell("on_train_end")
    steps = re.findall(r"^sft step (\d+)/12", capsys.readouterr().out, flags=re.MULTILINE)
    assert steps == ["1", "4", "7", "10", "12"]


def test_a_last_step_already_shown_is_not_repeated(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(ProgressCallback("sft", make_engine()), max_steps=1)
    run.step(clock, 1.0)
    run.tell("on_train_end")
    run.tell("on_train_end")
    assert capsys.readouterr().out.count("\n") == 1


def test_resumed_run_counts_time_and_steps_from_where_it_began(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(ProgressCallback("sft", make_engine()), max_steps=110, global_step=100)
    run.step(clock, 1.0)
    run.tell("on_train_end")
    assert capsys.readouterr().out.startswith("sft step 101/110 | ETA 0:00:09 | 800 tokens/s")


def test_other_processes_are_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(ProgressCallback("sft", make_engine()), max_steps=1, is_world_process_zero=False)
    run.step(clock, 1.0)
    run.tell("on_evaluate", metrics={"eval_loss": 1.0})
    run.tell("on_train_end")
    assert capsys.readouterr().out == ""


def test_terminal_gets_one_bar_updated_in_place(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    run = Run(ProgressCallback("sft", make_engine()), max_steps=3)
    for _ in range(3):
        run.step(clock, 1.0, {"loss": 2.0})
    run.tell("on_train_end")
    shown = terminal.getvalue()
    assert shown.count("\n") == 1  # the end of the bar
    last = shown.rstrip().split("\r")[-1]
    assert "3/3" in last
    assert "800 tokens/s | 60% of padded tokens saved | peak 1.50 GiB | loss 2" in last


def test_disable_tqdm_prints_lines_on_a_terminal(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    run = Run(ProgressCallback("sft", make_engine()), max_steps=1, disable_tqdm=True)
    run.step(clock, 1.0)
    run.tell("on_train_end")
    assert "\r" not in terminal.getvalue()
    assert terminal.getvalue().startswith("sft step 1/1 |")


def test_evaluation_is_shown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(ProgressCallback("dpo", make_engine()), max_steps=9)
    run.step(clock, 1.0)
    run.tell("on_evaluate", metrics={"eval_loss": 0.5, "eval_rewards/accuracies": 0.75})
    step, evaluation = capsys.readouterr().out.splitlines()
    assert step.startswith("dpo step 1/9 |")
    assert evaluation == "dpo evaluation at step 1 | loss 0.5 | rewards/accuracies 0.75"


def test_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="line_interval_s must be 0 or more"):
        ProgressCallback("sft", make_engine(), line_interval_s=-1.0)


def test_peak_memory_is_that_of_the_process() -> None:
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 2**26 < progress.peak_memory_bytes() < 2**40
    assert block[0] == 1


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_use_progress_replaces_the_stock_display(
    disable_tqdm: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=disable_tqdm,
    )
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 8
    trainer = Trainer(Regression(), args, train_dataset=rows)
    trainer.engine = make_engine()
    use_progress(trainer, "toy")
    callbacks: list[TrainerCallback] = trainer.callback_handler.callbacks
    assert not any(isinstance(c, StockProgressCallback | PrinterCallback) for c in callbacks)
    assert sum(isinstance(c, ProgressCallback) for c in callbacks) == 1

    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["toy step 1/3", "toy step 3/3"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert lines[0].endswith(f"loss {losses[0]:.4g}")
    assert lines[1].endswith(f"loss {losses[2]:.4g}")
