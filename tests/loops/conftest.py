"""Tiny models and fakes for loops, and a run that is killed at every single call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import disable_progress_bars
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from fastpost.loops.run import LoopResult
from fastpost.trainers.engine_trainer import EngineTrainer
from tests.trainers.methods import causal_model
from tests.trainers.methods import tokenizer as methods_tokenizer

disable_progress_bars()

TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 7,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fastpost.reference_cache.cache_root", lambda: tmp_path / "cache")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return methods_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return causal_model()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same_weights(one: Path | str, other: Path | str) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Killed(RuntimeError):
    """Stands for a process that ends."""


class Calls:
    """Wraps the fakes of a loop; `deadly` lets every call and training fail the first time."""

    def __init__(self, deadly: bool = False) -> None:
        self.done: Counter[str] = Counter()
        self._deadly = deadly
        self._died: set[str] = set()

    def die_once(self, key: str) -> None:
        if self._deadly and key not in self._died:
            self._died.add(key)
            raise Killed(key)

    def sampler(
        self, reply: Callable[[str, list[dict[str, str]], int], str | None]
    ) -> Callable[[str], Any]:
        """`reply(last folders of the model's path, conversation, seed)` as a chat model."""

        def make(folder: str) -> Any:
            name = _last_folders(folder)

            def chat(conversations: Sequence[Any], *, seed: int) -> list[str | None]:
                key = f"chat {name} {seed} {json.dumps(conversations)}"
                self.die_once(key)
                self.done[key] += 1
                return [reply(name, conversation, seed) for conversation in conversations]

            return chat

        return make

    def function(self, made: Callable[..., Any], name: str = "function") -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("trainer_state", None)
            told = [_last_folders(arg) for arg in args]
            key = f"{name} {json.dumps([told, kwargs], default=str)}"
            self.die_once(key)
            self.done[key] += 1
            return made(*args, **kwargs)

        call.__qualname__ = call.__name__ = name
        return call


def _last_folders(argument: Any) -> Any:
    """A model folder without the part that differs between runs."""
    if not isinstance(argument, str) or not argument.startswith("/"):
        return argument
    parts = Path(argument).parts
    return parts[-1] if parts[-1] == "start" else "/".join(parts[-2:])


@pytest.fixture
def killed_everywhere(monkeypatch, tmp_path):
    """Runs a loop undisturbed, and once more killed at its every call and in every training.

    `loop(calls, folder)` runs it with fakes of `calls`. Both must give the same rows, metrics and
    weights, and no call may be made twice. Returns the undisturbed result.
    """

    def check(loop: Callable[[Calls, Path], LoopResult]) -> LoopResult:
        undisturbed = Calls()
        expected = loop(undisturbed, tmp_path / "undisturbed")
        deadly = Calls(deadly=True)
        step = EngineTrainer.training_step

        def dying_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step:
                deadly.die_once(f"step {_last_folders(self.args.output_dir)}")
            return step(self, *args, **kwargs)

        monkeypatch.setattr(EngineTrainer, "training_step", dying_step)
        folder, deaths = tmp_path / "killed", 0
        while True:
            try:
                result = loop(deadly, folder)
                break
            except Killed:
                deaths += 1
        monkeypatch.undo()
        assert deaths >= len(deadly.done) + len(result.rows)
        assert deadly.done == undisturbed.done
        assert result.metrics == expected.metrics
        assert list(result.rows) == list(expected.rows)
        for stage, path in result.rows.items():
            assert path.read_bytes() == expected.rows[stage].read_bytes()
        assert same_weights(result.checkpoint, expected.checkpoint)
        before = dict(deadly.done)
        again = loop(deadly, folder)
        assert (again, dict(deadly.done)) == (result, before)
        return expected

    return check
