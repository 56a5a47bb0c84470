"""Runs of GRPO and RLOO, ours beside stock TRL, on the same completions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM

from fastpost.trainers.group_order import groups_kept_together
from tests.trainers.conftest import tiny_model
from tests.trainers.fixed_samples import FixedSamples, uneven_reward

# Plain SGD where gradients begin as rounding noise (LoRA's B is zero), which Adam would scale up.
SGD = {"optim": "sgd", "learning_rate": 0.1}
_ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA, DORA = LoraConfig(**_ADAPTER), LoraConfig(**_ADAPTER, use_dora=True)
GROUP = 4
SETTINGS = {
    "num_generations": GROUP,
    "per_device_train_batch_size": 2 * GROUP,
    "max_completion_length": 12,
    "temperature": 0.9,
}
TIMED_METRICS = {"step_time", "epoch", "grad_norm", "learning_rate", "loss"}


def model_from_folder(folder: Path, vocab_size: int) -> LlamaForCausalLM:
    """A policy that came from a folder, where TRL looks for the reference."""
    tiny_model(vocab_size).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def in_group_order(trainer_class: type[Any], module: ModuleType) -> type[Any]:
    """Stock TRL with the order of micro-batches that ours has."""

    def prepare_inputs(trainer: Any, batch: Any) -> Any:
        rows = trainer.args.per_device_train_batch_size
        with groups_kept_together(module, trainer.num_generations, rows, 0):
            return trainer_class._prepare_inputs(trainer, batch)

    return type(trainer_class.__name__, (trainer_class,), {"_prepare_inputs": prepare_inputs})


def run_ours(
    run_trainer: Callable[..., Any],
    classes: tuple[type[Any], type[Any]],
    model: LlamaForCausalLM,
    data: Dataset,
    config: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """A trainer after its steps on fixed completions."""
    sampled = FixedSamples(model.config.vocab_size).grouped(classes[0])
    options = {"reward_funcs": uneven_reward} | options
    return run_trainer(sampled, classes[1], model, data, options, **SETTINGS | config)


def run_pair(
    run_trainer: Callable[..., Any],
    stock: tuple[type[Any], type[Any], ModuleType],
    ours: tuple[type[Any], type[Any]],
    model: LlamaForCausalLM,
    data: Dataset,
    config: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Any, Any]:
    """Both trainers after their steps on the same completions: (ours, stock)."""
    mine = run_ours(run_trainer, ours, model, data, config, options)
    stock_config = {name: value for name, value in config.items() if name != "prefix_sharing"}
    ordered = (in_group_order(stock[0], stock[2]), stock[1])
    return mine, run_ours(run_trainer, ordered, model, data, stock_config, options)


def assert_same_metrics(ours: Any, stock: Any) -> None:
    for mine, theirs in zip(ours.logs, stock.logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - TIMED_METRICS:
            if mine[name] is None or theirs[name] is None:
                assert mine[name] is theirs[name], name
                continue
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=2e-4, rel=1e-3), name
