"""Reward models: the steps TRL takes, the rewards TRL gives, and the same ones after a reload."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import trl
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import fastpost
from fastpost.pooling import accelerate_pooled

SKIPPED_METRICS = {"epoch", "grad_norm", "learning_rate", "loss"}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


@pytest.fixture
def reward_model(tokenizer) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), num_labels=1)
    return LlamaForSequenceClassification(config)


# Plain SGD: LoRA's B starts at zero, and Adam would scale its rounding noise up to whole steps.
SGD = {"optim": "sgd", "learning_rate": 0.01}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
CASES = {
    "plain": ({}, {}),
    "centred": ({"center_rewards_coefficient": 0.1}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "lora": (SGD, {"peft_config": LoraConfig(**LORA)}),
    "dora": (SGD, {"peft_config": LoraConfig(**LORA, use_dora=True)}),
    "lora-checkpointing": (
        SGD | {"gradient_checkpointing": True},
        {"peft_config": LoraConfig(**LORA)},
    ),
    "no-sharing": ({"prefix_sharing": False}, {}),
}


def run_both(run_trainer, model, data, config, options):
    stock_config = {k: v for k, v in config.items() if k != "prefix_sharing"}
    stock = run_trainer(
        trl.RewardTrainer, trl.RewardConfig, model, data, trainer_options=options, **stock_config
    )
    ours = run_trainer(
        fastpost.RewardTrainer,
        fastpost.RewardConfig,
        model,
        data,
        trainer_options=options,
        **config,
    )
    return ours, stock


def assert_same_metrics(ours, stock) -> None:
    for mine, theirs in zip(ours.logs, stock.logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - SKIPPED_METRICS:
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-4), name


@pytest.mark.parametrize(("config", "options"), CASES.values(), ids=CASES)
def test_the_same_steps_as_trl(
    config, options, reward_model, preference_data, run_trainer, assert_same_run
) -> None:
    ours, stock = run_both(run_trainer, reward_model, preference_data, config, options)
    assert_same_run(ours.trace, stock.trace)
    assert_same_metrics(ours.trace, stock.trace)
    engine = ours.engine
    assert engine.packed_forwards and not engine.fallbacks
    assert engine.stats.row_tokens < engine.stats.padded_tokens
    shares = config.get("prefix_sharing", True)
    assert (engine.stats.unique_tokens < engine.stats.row_tokens) == shares


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_margins(sign, reward_model, preference_data, run_trainer, assert_same_run) -> None:
    margins = [sign * (i % 4) for i in range(len(preference_data))]
    data = preference_data.add_column("margin", margins)
    ours, stock = run_both(run_trainer, reward_model, data, {}, {})
    assert_same_run(ours.trace, stock.trace)
    assert ours.engine.packed_forwards and not ours.engine.fallbacks
    plain = run_trainer(
        fastpost.RewardTrainer, fastpost.RewardConfig, reward_model, preference_data
    )
    with pytest.raises(AssertionError):
        assert_same_run(plain.trace, ours.trace)


def test_evaluation_is_packed_and_equal(reward_model, preference_data, run_trainer) -> None:
    ours, stock = run_both(run_trainer, reward_model, preference_data, {"max_steps": 1}, {})
    before = ours.engine.packed_forwards
    mine, theirs = ours.evaluate(preference_data), stock.evaluate(preference_data)
    assert ours.engine.packed_forwards > before
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name


def batch_of(tokenizer, texts) -> dict[str, torch.Tensor]:
    return tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)


TEXTS = ["what is 1 + 1? it is 2", "what is 1 + 1? it is 3", "no"]


@pytest.mark.parametrize("with_adapter", [False, True], ids=["full", "lora"])
def test_rewards_survive_saving_and_loading(
    with_adapter, reward_model, tokenizer, preference_data, run_trainer, tmp_path
) -> None:
    # The base is a language model, as it is in practice: its reward head is drawn when loaded.
    base = tmp_path / "base"
    torch.manual_seed(3)
    language_model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer)))
    language_model.save_pretrained(base)
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    options = {"peft_config": LoraConfig(**LORA)} if with_adapter else {}
    trainer = run_trainer(
        fastpost.RewardTrainer,
        fastpost.RewardConfig,
        model,
        preference_data,
        trainer_options=options,
        learning_rate=1e-2,
    )
    expected = trainer.model.eval()(**batch_of(tokenizer, TEXTS)).logits
    trainer.save_model(str(tmp_path / "saved"))
    torch.manual_seed(5)
    if with_adapter:
        again = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        drawn = again.score.weight.clone()
        again = PeftModel.from_pretrained(again, tmp_path / "saved")
        assert not torch.equal(again.get_base_model().score.weight, drawn)
    else:
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert again.config.num_labels == 1
    actual = again.eval()(**batch_of(tokenizer, TEXTS)).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    # What a loop that scores rollouts does: frozen, accelerated, no gradients.
    engine = accelerate_pooled(again.requires_grad_(False))
    with torch.no_grad():
        accelerated = again(**batch_of(tokenizer, TEXTS)).logits
    torch.testing.assert_close(accelerated, actual, atol=1e-6, rtol=1e-5)
    assert engine.packed_forwards == 1


def trainer_of(model, data, tokenizer, tmp_path, peft_config=None, **config):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    return fastpost.RewardTrainer(
        model,
        args=fastpost.RewardConfig(**settings | config),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def test_an_adapter_that_would_lose_the_head_is_refused(
    reward_model, preference_data, tokenizer, tmp_path
) -> None:
    # Without its kind of task PEFT freezes the random head and saves nothing of it.
    settings = {k: v for k, v in LORA.items() if k != "task_type"}
    for saved in (None, ["embed_tokens"]):
        with pytest.raises(ValueError, match="would not save the classification head"):
            trainer_of(
                copy.deepcopy(reward_model),
                preference_data,
                tokenizer,
                tmp_path,
                LoraConfig(**settings, modules_to_save=saved),
            )
    peft_config = LoraConfig(**settings, modules_to_save=["score"])
    trainer = trainer_of(reward_model, preference_data, tokenizer, tmp_path, peft_config)
    assert trainer.engine.is_installed


def test_what_cannot_be_meant_is_refused(
    reward_model, preference_data, tokenizer, tmp_path, caplog
) -> None:
    def build(model=reward_model, data=preference_data, **config):
        return trainer_of(model, data, tokenizer, tmp_path, **config)

    with pytest.raises(ValueError, match="chosen"):
        build(data=preference_data.rename_column("rejected", "loser"))
    with pytest.raises(ValueError, match="empty"):
        build(data=preference_data.select([]))
    with pytest.raises(ValueError, match="memory_budget_gb"):
        build(memory_budget_gb=1.0)
    with pytest.raises(ValueError, match="every pair"):
        build(max_length=8)
    whole = build().train_dataset
    longest = max(len(ids) for ids in whole["rejected_ids"])
    with caplog.at_level(logging.WARNING, "fastpost"):
        kept = build(max_length=longest - 1).train_dataset
    assert 0 < len(kept) < len(preference_data)
    assert f"{len(preference_data) - len(kept)} of {len(preference_data)} pairs" in caplog.text
    two = LlamaForSequenceClassification(
        LlamaConfig(**SIZES, vocab_size=len(tokenizer), num_labels=2)
    )
    with pytest.raises(ValueError, match="num_labels=1"):
        build(model=two)
