"""RLOO: the same steps as TRL on the same completions."""

from __future__ import annotations

from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl.trainer import rloo_trainer as trl_rloo

import fastpost
from tests.trainers.group_runs import (
    GROUP,
    LORA,
    SGD,
    assert_same_metrics,
    model_from_folder,
    run_pair,
)

STOCK = (trl.RLOOTrainer, trl.RLOOConfig, trl_rloo)
OURS = (fastpost.RLOOTrainer, fastpost.RLOOConfig)
SPLIT = {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kl": ({"beta": 0.1}, {}),
    "iterations": ({"beta": 0.0, "num_iterations": 2, "epsilon": 0.01, "epsilon_high": 0.02}, {}),
    "normalised": ({"normalize_advantages": True, "mask_truncated_completions": True}, {}),
    "accumulation": (SPLIT | {"gradient_checkpointing": True}, {}),
    "stale-steps": (SPLIT | {"gradient_accumulation_steps": 1, "steps_per_generation": 2}, {}),
    "lora-kl": (SGD | {"beta": 0.1, "learning_rate": 0.02}, {"peft_config": LORA}),
}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory, tokenizer) -> LlamaForCausalLM:
    return model_from_folder(tmp_path_factory.mktemp("policy"), len(tokenizer))


@pytest.fixture(scope="session")
def prompts(preference_data) -> Dataset:
    return preference_data.select_columns(["prompt"])


@pytest.mark.parametrize(("config", "options"), CASES.values(), ids=CASES.keys())
def test_takes_the_steps_of_trl(
    config, options, saved_model, prompts, run_trainer, assert_same_run
) -> None:
    ours, stock = run_pair(run_trainer, STOCK, OURS, saved_model, prompts, config, options)
    assert_same_run(ours.trace, stock.trace)
    assert_same_metrics(ours.trace, stock.trace)
    assert ours.engine.packed_forwards and not ours.engine.fallbacks
    stats = ours.engine.stats
    assert stats.scored_tokens < stats.unique_tokens < stats.row_tokens < stats.padded_tokens
