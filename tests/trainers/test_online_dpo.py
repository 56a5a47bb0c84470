"""Online DPO: the same steps as TRL on the same completions, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM

import fastpost
from fastpost.trainers.online_dpo import trl_online_dpo
from tests.trainers.conftest import tiny_model
from tests.trainers.fixed_samples import FixedSamples, uneven_reward
from tests.trainers.test_parity import assert_same_metrics

OURS = (fastpost.OnlineDPOTrainer, fastpost.OnlineDPOConfig)
STOCK = (trl_online_dpo.OnlineDPOTrainer, trl_online_dpo.OnlineDPOConfig)
# Adam turns rounding noise in small gradients into whole steps; SGD keeps to the gradients.
SGD = {"optim": "sgd", "learning_rate": 0.1}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
SETTINGS = {"max_new_tokens": 12, "max_length": 256}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {}),
    "ipo": (SGD | {"loss_type": "ipo", "beta": 0.5, "missing_eos_penalty": 1.0}, {}),
    "other-reference": ({}, {"ref_model": tiny_model(259, seed=1)}),
    "lora": (SGD, {"peft_config": LORA}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    # Clipped to one length: TRL adds the gradients of micro-batches up where we take their mean.
    "accumulation": (
        SGD
        | {
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "max_grad_norm": 0.01,
        },
        {},
    ),
    "truncated": ({"max_length": 60}, {}),
    "no-sharing": ({"prefix_sharing": False}, {}),
}


@pytest.fixture(scope="session")
def prompts(preference_data) -> Dataset:
    return preference_data.select_columns(["prompt"])


def on_fixed_samples(trainer_class: type[Any], vocab_size: int) -> type[Any]:
    """The trainer with fixed completions, each loss before rounding in `steps`, and log-probs that
    are zero behind a completion, as ours are."""
    source, steps = FixedSamples(vocab_size), []

    def generate(trainer: Any, model: Any, prompts: Any, images: Any = None) -> Any:
        tokenizer = trainer.processing_class
        prompt_ids = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_dict=False
        )
        completions = [{"input_ids": source.complete(ids)} for ids in prompt_ids * 2]
        left = tokenizer.pad(
            [{"input_ids": ids} for ids in prompt_ids * 2], padding_side="left", return_tensors="pt"
        )
        right = tokenizer.pad(completions, padding_side="right", return_tensors="pt")
        return *left.values(), *right.values(), None

    def forward(trainer: Any, model: Any, *batch: Any) -> Any:
        return trainer_class._forward(trainer, model, *batch) * batch[3]

    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        loss = trainer_class.training_step(trainer, *args, **kwargs)
        steps.append(loss.item())
        return loss

    members = {
        "_generate": generate,
        "_forward": forward,
        "training_step": training_step,
        "steps": steps,
        "__module__": trainer_class.__module__,
    }
    return type(trainer_class.__name__, (trainer_class,), members)


@pytest.mark.parametrize(("config", "options"), CASES.values(), ids=CASES.keys())
def test_takes_the_steps_of_trl(
    config, options, model, prompts, run_trainer, assert_same_run
) -> None:
    options = {"reward_funcs": uneven_reward} | options
    stock_config = {k: v for k, v in config.items() if k != "prefix_sharing"}
    runs = []
    for (trainer_class, config_class), settings in ((OURS, config), (STOCK, stock_config)):
        sampled = on_fixed_samples(trainer_class, model.config.vocab_size)
        runs.append(
            run_trainer(sampled, config_class, model, prompts, options, **SETTINGS | settings)
        )
    ours, stock = runs
    assert_same_run(ours.trace, stock.trace, loss_atol=2e-4)  # TRL logs the loss rounded
    assert ours.steps == pytest.approx(stock.steps, abs=1e-5)
    assert_same_metrics(ours.trace, stock.trace)
    assert ours.engine.packed_forwards and not ours.engine.fallbacks
    stats = ours.engine.stats
    assert stats.scored_tokens < stats.unique_tokens < stats.row_tokens < stats.padded_tokens
    # The last token of a row predicts nothing; what else is saved is shared.
    saved = stats.row_tokens - stats.unique_tokens - len(ours.trace.losses) * 2 * 4
    assert saved > 0 if config.get("prefix_sharing", True) else saved == 0


def test_beta_may_change_from_epoch_to_epoch(model, prompts, run_trainer) -> None:
    config = SETTINGS | {"beta": [0.1, 0.3], "max_steps": 3}
    options = {"reward_funcs": uneven_reward}
    trainer = run_trainer(*OURS, model, prompts.select(range(4)), options, **config)
    assert [log["beta"] for log in trainer.trace.logs] == [0.1, 0.3, 0.3]


def test_metrics_leave_the_padding_out(model, prompts, run_trainer) -> None:
    """Where no completion is shorter than another, TRL's sums and ours are the same."""
    logs = []
    for trainer_class, config_class in (OURS, STOCK):
        trainer = run_trainer(
            trainer_class,
            config_class,
            model,
            prompts,
            {"reward_funcs": uneven_reward},
            **SETTINGS | {"generation_kwargs": {"min_new_tokens": 12}, "max_steps": 2},
        )
        logs.append(trainer.trace)
    assert_same_metrics(*logs)
    assert logs[0].logs[0]["val/contain_eos_token"] == 0


@pytest.mark.parametrize("options", [{}, {"peft_config": LORA}], ids=["full", "lora"])
def test_a_bf16_copy_differs_a_little_and_is_measured(model, options, prompts, run_trainer) -> None:
    config = SETTINGS | {"rollout_dtype": "bfloat16", "rollout_mismatch_limit": 0.01}
    trainer = run_trainer(
        *OURS, model, prompts, {"reward_funcs": uneven_reward} | options, **config
    )
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.rollout.copy.model.dtype == torch.bfloat16
    for log in trainer.trace.logs:
        assert 0 < log["rollout/kl"] < 0.01 and 0.9 < log["rollout/ess"] < 1


def test_the_model_itself_is_at_no_distance(model, prompts, run_trainer) -> None:
    """Sampled at temperature 0.9, scored at 1: compared at 1."""
    config = SETTINGS | {"rollout_mismatch_limit": 1e-6}
    trainer = run_trainer(*OURS, model, prompts, {"reward_funcs": uneven_reward}, **config)
    assert all(log["rollout/kl"] < 1e-9 for log in trainer.trace.logs)


def test_the_reference_is_scored_under_autocast_like_the_policy(
    model, prompts, run_trainer
) -> None:
    """Otherwise the first step would find a policy that differs from its own copy."""
    trainer = run_trainer(
        *OURS,
        model,
        prompts,
        {"reward_funcs": uneven_reward},
        **SETTINGS | {"bf16": True, "max_steps": 1},
    )
    assert trainer.trace.logs[0]["objective/kl"] == 0.0


def test_what_cannot_be_honoured_is_refused(model, prompts, tokenizer, tmp_path) -> None:
    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        options = {"ref_model": None, "train_dataset": prompts}
        options |= {name: changes.pop(name) for name in options if name in changes}
        settings = {"use_cpu": True, "bf16": False, "report_to": []} | SETTINGS | changes
        with pytest.raises(error, match=match):
            fastpost.OnlineDPOTrainer(
                policy,
                reward_funcs=uneven_reward,
                args=fastpost.OnlineDPOConfig(str(tmp_path), **settings),
                processing_class=tokenizer,
                **options,
            )

    policy: LlamaForCausalLM = copy.deepcopy(model)
    shared = copy.deepcopy(model)
    shared.lm_head.weight = policy.lm_head.weight
    refused(ImportError, r"pip install 'fastpost\[vllm\]'", use_vllm=True)
    refused(ValueError, "leaves no room for a prompt", max_length=12)
    refused(ValueError, "ref_model is the same object", ref_model=policy)
    refused(ValueError, "ref_model shares memory", ref_model=shared)
    refused(
        ValueError, "needs the columns prompt", train_dataset=prompts.rename_column("prompt", "q")
    )
    refused(ValueError, "train_dataset is empty", train_dataset=prompts.select([]))
    refused(ValueError, "rollout_dtype must be None or one of", rollout_dtype="fp8")
