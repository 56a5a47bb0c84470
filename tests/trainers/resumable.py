"""Runs that are killed and resumed: how to build them, and when two of them are the same.

As a program (`python -m tests.trainers.resumable runs.json`) it carries out a list of runs, each in
a process of its own that is forked after the imports, and prints how each one ended.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

import fastpost
from fastpost.trainers.cached_reference import CachedReference
from tests.trainers.methods import METHODS, build_trainer, saved_model, settings_of

LORA = LoraConfig(
    r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
)
# Logged every third step and saved every second, so that most checkpoints hold a sum not logged
# yet; with three steps an epoch, checkpoint 6 ends the second epoch and 4 lies within it.
SETTINGS = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
# A cycle of four steps on the same completions, one cycle an epoch.
_CYCLE = {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1}
# Name -> method, config, constructor arguments, rows of data.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "SFT": ("SFT", {}, {}, 12),
    "SFT-dropout": ("SFT", {"prefix_sharing": False}, {"peft_config": LORA}, 12),
    "SFT-by-length": ("SFT", {"train_sampling_strategy": "group_by_length"}, {}, 12),
    "SFT-accumulated": (
        "SFT",
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {},
        12,
    ),
    "DPO": ("DPO", {"reference": "frozen"}, {"ref_model": None}, 12),
    "DPO-cached": ("DPO", {"reference": "cached"}, {"ref_model": None}, 12),
    "DPO-following": (
        "DPO",
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
        {},
        12,
    ),
    "KTO-cached": ("KTO", {"reference": "cached"}, {"ref_model": None}, 12),
    **{name: (name, {}, {}, 12) for name in METHODS if name not in ("SFT", "DPO", "GRPO", "RLOO")},
    **{name: (name, _CYCLE, {}, 4) for name in METHODS if name in ("GRPO", "RLOO")},
}
_TIMED = re.compile("time|runtime|per_second|tokens_per")


class KillAfterStep(TrainerCallback):
    """Ends the process without a word when a step is over, before anything is saved."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def build(case: str, output_dir: Path, models: Path, **config: Any) -> Any:
    """The trainer of a case, made from the same weights and rows every time."""
    method_name, own, options, rows = CASES[case]
    method = METHODS[method_name]
    model = method.model()
    model.config._name_or_path = str(saved_model(method_name, models))  # of TRL's references
    processes = {"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}
    settings = settings_of(method, output_dir, **(SETTINGS | own | processes | config))
    options = method.options(torch.float32) | options
    data = method.data().select(range(rows))
    if "eval_strategy" in config:
        options["eval_dataset"] = data
    return build_trainer(method, settings, model, data, **options)


def kill_in_save(trainer: Any, step: int) -> None:
    """End the process in a save: weights are written, optimizer and scheduler are not."""
    stock: Callable[[str], None] = trainer._save_optimizer_and_scheduler

    def kill(output_dir: str) -> None:
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        stock(output_dir)

    trainer._save_optimizer_and_scheduler = kill


def kill_in_reference(batches: int) -> None:
    """End the process after so many batches of reference log-probs."""
    stock, done = CachedReference._score_with_reference, []

    def score(self: Any, rows: Any) -> torch.Tensor:
        if len(done) == batches:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(rows)
        return stock(self, rows)

    CachedReference._score_with_reference = score


def differences(one: Path, other: Path) -> list[str]:
    """Where two checkpoints differ in one bit: weights, optimizer, schedule, random state, logs."""
    names = sorted(p.name for p in one.iterdir())
    found = [] if names == sorted(p.name for p in other.iterdir()) else [f"files of {one}, {other}"]
    for name in names:
        if name == "trainer_state.json":
            mine, theirs = (json.loads((d / name).read_text())["log_history"] for d in (one, other))
            found += _differing(_without_times(mine), _without_times(theirs), name)
        elif name.endswith(".safetensors"):
            found += _differing(load_file(one / name), load_file(other / name), name)
        elif name.endswith((".pt", ".pth")):
            with safe_globals():
                loaded = [torch.load(d / name, weights_only=True) for d in (one, other)]
            found += _differing(*loaded, name)
        elif name.startswith("fastpost_"):
            mine, theirs = (json.loads((d / name).read_text()) for d in (one, other))
            found += _differing(_without_times(mine), _without_times(theirs), name)
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not _TIMED.search(k)}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def _differing(one: Any, other: Any, place: str) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{place}: other keys"] if one.keys() != other.keys() else []
        for key in one.keys() & other.keys():
            found += _differing(one[key], other[key], f"{place}.{key}")
        return found
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{place}: {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [line for i, (a, b) in pairs for line in _differing(a, b, f"{place}[{i}]")]
    if isinstance(one, torch.Tensor):
        same = torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        same = np.array_equal(one, other)
    else:
        same = one == other or (one != one and other != other)
    return [] if same else [f"{place}: {one!r} and {other!r}"[:200]]


def _run(folder: Path, case: str, kill_at: str | None, resume: bool, name: str) -> None:
    kind, _, step = (kill_at or "").partition(":")
    if kind == "in-reference":
        kill_in_reference(int(step))
    trainer = build(case, folder / name, folder)
    if kind == "in-save":
        kill_in_save(trainer, int(step))
    elif kind == "after-step":
        trainer.add_callback(KillAfterStep(int(step)))
    trainer.train(resume_from_checkpoint=resume)


def main(runs_file: str) -> None:
    """Carry out runs one after another; print the exit status of each as JSON."""
    folder, runs = Path(runs_file).parent, json.loads(Path(runs_file).read_text())
    for case in {run["case"] for run in runs}:
        # Imported once, before the processes part.
        assert getattr(fastpost, f"{CASES[case][0]}Trainer")
    statuses = []
    for run in runs:
        child = os.fork()
        if child == 0:
            try:
                _run(folder, **run)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(sys.argv[1])
