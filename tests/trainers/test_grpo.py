"""GRPO: the same steps as TRL on the same completions, groups whole, the reference watched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl.trainer import grpo_trainer as trl_grpo

import fastpost
from fastpost.scoring import FastpostWarning
from tests.trainers.fixed_samples import FixedSamples, uneven_reward
from tests.trainers.group_runs import (
    DORA,
    GROUP,
    LORA,
    SETTINGS,
    SGD,
    assert_same_metrics,
    model_from_folder,
    run_ours,
    run_pair,
)

STOCK = (trl.GRPOTrainer, trl.GRPOConfig, trl_grpo)
OURS = (fastpost.GRPOTrainer, fastpost.GRPOConfig)
SPLIT = {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": ({}, {}),
    "grpo-kl": ({"loss_type": "grpo", "beta": 0.1}, {}),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "dr-grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, {}),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "num_iterations": 2,
            "epsilon": 3e-3,
            "epsilon_high": 4e-3,
        },
        {},
    ),
    "iterations-clip-higher": ({"num_iterations": 2, "epsilon": 0.01, "epsilon_high": 0.02}, {}),
    "stale-steps": ({"steps_per_generation": 2}, {}),
    "accumulation-kl": (SPLIT | {"beta": 0.1}, {}),
    "lora-kl": (SGD | {"beta": 0.1}, {"peft_config": LORA}),
    "dora-kl": (SGD | {"beta": 0.1}, {"peft_config": DORA}),
    "checkpointing": ({"gradient_checkpointing": True, "beta": 0.1}, {}),
    "truncated-masked": ({"mask_truncated_completions": True}, {}),
    "entropy-quantile": ({"top_entropy_quantile": 0.4}, {}),
    "no-sharing": ({"prefix_sharing": False}, {}),
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
    if config.get("num_iterations", 1) > 1:  # otherwise nothing would say that clipping is right
        assert max(log["clip_ratio/region_mean"] for log in ours.trace.logs) > 0
    stats = ours.engine.stats
    assert stats.scored_tokens < stats.unique_tokens <= stats.row_tokens <= stats.padded_tokens


def test_another_objective_would_be_noticed(
    saved_model, prompts, run_trainer, assert_same_run
) -> None:
    runs = [
        run_ours(run_trainer, OURS, saved_model, prompts, {"beta": beta}, {}) for beta in (0.1, 0.2)
    ]
    with pytest.raises(AssertionError):
        assert_same_run(runs[0].trace, runs[1].trace)


def count_by_hand(prompt: list[int], completions: list[list[int]]) -> int:
    """Tokens that have to be computed: the prompt, and each completion but for its last token.

    (The last token of a row predicts nothing; completions with equal beginnings share those too.)
    """
    rows = [tuple(prompt + completion)[:-1] for completion in completions]
    return len({row[: end + 1] for row in rows for end in range(len(row))})


@pytest.mark.parametrize("order", ["groups", "stock"])
def test_the_prompt_of_a_group_is_computed_once(
    order, saved_model, prompts, tokenizer, run_trainer, monkeypatch
) -> None:
    """One rollout of two groups over two micro-batches, and what TRL's own order would cost."""
    if order == "stock":
        stock_inputs = trl.GRPOTrainer._prepare_inputs
        monkeypatch.setattr(fastpost.GRPOTrainer, "_prepare_inputs", stock_inputs)
    source = FixedSamples(saved_model.config.vocab_size)
    sampled: list[tuple[list[int], list[int]]] = []

    def single_turn(trainer: Any, prompt_ids: Any, *rest: Any) -> Any:
        sampled.extend((ids, source.complete(ids)) for ids in prompt_ids)
        return [completion for _, completion in sampled], None

    trainer_class = source.grouped(fastpost.GRPOTrainer, _generate_single_turn=single_turn)
    trainer = run_trainer(
        trainer_class,
        fastpost.GRPOConfig,
        saved_model,
        prompts,
        trainer_options={"reward_funcs": uneven_reward},
        **SETTINGS | SPLIT | {"max_steps": 1},
    )
    groups = [sampled[:GROUP], sampled[GROUP:]]
    assert [len({tuple(prompt) for prompt, _ in group}) for group in groups] == [1, 1]
    by_hand = sum(count_by_hand(group[0][0], [c for _, c in group]) for group in groups)
    if order == "groups":
        assert trainer.engine.stats.unique_tokens == by_hand
    else:
        assert trainer.engine.stats.unique_tokens > by_hand


def test_groups_that_are_split_are_warned_of(saved_model, prompts, tokenizer, tmp_path) -> None:
    with pytest.warns(FastpostWarning, match=r"\(2\) is not a multiple of num_generations \(4\)"):
        fastpost.GRPOTrainer(
            copy.deepcopy(saved_model),
            uneven_reward,
            fastpost.GRPOConfig(
                str(tmp_path),
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=2,
                steps_per_generation=2,
                num_generations=GROUP,
            ),
            prompts,
            processing_class=tokenizer,
        )
