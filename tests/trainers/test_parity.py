"""Ours and stock TRL from the same weights take the same steps."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import trl
from peft import LoraConfig

import fastpost

# TRL logs rounded numbers nowhere: losses are compared as computed. Metrics that both log must
# agree as well, so that a dashboard keeps its meaning when the import line changes.
SKIPPED_METRICS = {"epoch", "grad_norm", "learning_rate", "loss"}


def assert_same_metrics(ours, stock, atol=2e-4) -> None:
    for mine, theirs in zip(ours.logs, stock.logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - SKIPPED_METRICS:
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=atol, rel=1e-3), name


SFT_CASES = {
    "plain": {},
    "packed-bfd": {"packing": True, "max_length": 96},
    "dft": {"loss_type": "dft"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing-reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "truncated": {"max_length": 60},
    "no-sharing": {"prefix_sharing": False},
}


@pytest.mark.parametrize("config", SFT_CASES.values(), ids=SFT_CASES.keys())
def test_sft(config, model, prompt_completion_data, run_trainer, assert_same_run) -> None:
    stock_config = {k: v for k, v in config.items() if k != "prefix_sharing"}
    stock = run_trainer(
        trl.SFTTrainer, trl.SFTConfig, model, prompt_completion_data, **stock_config
    )
    ours = run_trainer(
        fastpost.SFTTrainer, fastpost.SFTConfig, model, prompt_completion_data, **config
    )
    assert_same_run(ours.trace, stock.trace)
    assert_same_metrics(ours.trace, stock.trace)
    assert ours.engine.packed_forwards and not ours.engine.fallbacks
    assert ours.engine.stats.scored_tokens < ours.engine.stats.unique_tokens


def test_sft_assistant_only(model, messages_data, run_trainer, assert_same_run) -> None:
    config = {"assistant_only_loss": True}
    stock = run_trainer(trl.SFTTrainer, trl.SFTConfig, model, messages_data, **config)
    ours = run_trainer(fastpost.SFTTrainer, fastpost.SFTConfig, model, messages_data, **config)
    assert_same_run(ours.trace, stock.trace)
    assert_same_metrics(ours.trace, stock.trace)
    assert 0 < ours.mask_reports["train"].scored < ours.mask_reports["train"].tokens


# LoRA's B starts at zero, so the first gradients of A are rounding noise, which Adam would scale up
# to whole steps of either sign. Plain SGD keeps the comparison about gradients.
SGD = {"optim": "sgd", "learning_rate": 0.1}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
DORA = LoraConfig(
    r=4, lora_alpha=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"
)
DPO_CASES = {
    "sigmoid": ({}, {}),
    "precomputed-reference": ({"precompute_ref_log_probs": True}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "lora": (SGD, {"peft_config": LORA}),
    "dora": (SGD, {"peft_config": DORA}),
    "lora-checkpointing": (SGD | {"gradient_checkpointing": True}, {"peft_config": LORA}),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {}),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.1}, {}),
    "ipo": ({"loss_type": "ipo"}, {}),
    "weighted": ({"use_weighting": True}, {}),
    "length-desensitised": ({"ld_alpha": 0.5}, {}),
    **{
        name: ({"loss_type": name}, {})
        for name in (
            "hinge",
            "nca_pair",
            "bco_pair",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sft",
            "sigmoid_norm",
        )
    },
    # Its loss is a square that reaches 50 at these settings, where 1e-5 is beyond fp32.
    "sppo_hard": ({"loss_type": "sppo_hard", "beta": 1.0, "learning_rate": 1e-5}, {}),
    "exo_pair": ({"loss_type": "exo_pair", "label_smoothing": 0.1}, {}),
    **{
        name: ({"f_divergence_type": name}, {})
        for name in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "sigmoid+sft": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {}),
}


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
def test_sft_with_an_adapter(
    adapter, model, prompt_completion_data, run_trainer, assert_same_run
) -> None:
    options = {"peft_config": adapter}
    runs = [
        run_trainer(
            library.SFTTrainer, library.SFTConfig, model, prompt_completion_data, options, **SGD
        )
        for library in (fastpost, trl)
    ]
    assert_same_run(runs[0].trace, runs[1].trace)
    assert runs[0].engine.packed_forwards and not runs[0].engine.fallbacks


def test_every_dpo_loss_of_trl_is_compared() -> None:
    listed = next(f for f in dataclasses.fields(trl.DPOConfig) if f.name == "loss_type").metadata[
        "help"
    ]
    compared = {
        name
        for config, _ in DPO_CASES.values()
        for name in [config.get("loss_type", "sigmoid")]
        if isinstance(name, str)
    }
    assert compared == set(re.findall(r"`'(\w+)'`", listed))


@pytest.mark.parametrize(("config", "options"), DPO_CASES.values(), ids=DPO_CASES.keys())
def test_dpo(config, options, model, preference_data, run_trainer, assert_same_run) -> None:
    if "peft_config" not in options:
        options = options | {"ref_model": model}
    stock = run_trainer(
        trl.DPOTrainer, trl.DPOConfig, model, preference_data, trainer_options=options, **config
    )
    ours = run_trainer(
        fastpost.DPOTrainer,
        fastpost.DPOConfig,
        model,
        preference_data,
        trainer_options=options,
        **config,
    )
    assert_same_run(ours.trace, stock.trace)
    assert_same_metrics(ours.trace, stock.trace)
    assert ours.first_step.startswith("policy equals reference")
    assert ours.engine.packed_forwards and not ours.engine.fallbacks
    stats = ours.engine.stats
    assert stats.scored_tokens < stats.unique_tokens < stats.row_tokens < stats.padded_tokens


def test_dpo_bf16_autocast(model, preference_data, run_trainer, assert_same_run) -> None:
    """Both round to bf16 at other places; they must agree as far as bf16 does."""
    config, options = {"bf16": True}, {"ref_model": model}
    stock = run_trainer(
        trl.DPOTrainer, trl.DPOConfig, model, preference_data, trainer_options=options, **config
    )
    ours = run_trainer(
        fastpost.DPOTrainer,
        fastpost.DPOConfig,
        model,
        preference_data,
        trainer_options=options,
        **config,
    )
    assert_same_run(ours.trace, stock.trace, loss_atol=3e-2, weight_atol=6e-3, grad_rtol=0.1)


def test_a_different_objective_would_be_noticed(
    model, preference_data, run_trainer, assert_same_run
) -> None:
    """The comparison above can fail: another beta is another run."""
    options = {"ref_model": model}
    one = run_trainer(
        fastpost.DPOTrainer,
        fastpost.DPOConfig,
        model,
        preference_data,
        trainer_options=options,
        beta=0.1,
    )
    other = run_trainer(
        fastpost.DPOTrainer,
        fastpost.DPOConfig,
        model,
        preference_data,
        trainer_options=options,
        beta=0.11,
    )
    with pytest.raises(AssertionError):
        assert_same_run(one.trace, other.trace)


def test_trl_configs_are_taken_as_they_are(model, preference_data, run_trainer) -> None:
    trainer = run_trainer(
        fastpost.DPOTrainer,
        trl.DPOConfig,
        model,
        preference_data,
        trainer_options={"ref_model": model},
        max_steps=1,
        beta=0.3,
    )
    assert isinstance(trainer.args, fastpost.DPOConfig) and trainer.beta == 0.3
    assert torch.isfinite(torch.tensor(trainer.trace.losses)).all()


def test_assistant_only_without_generation_markers(
    model, messages_data, run_trainer, tokenizer, assert_same_run, monkeypatch
) -> None:
    """A template without markers trains the same run as the marked one, in stock TRL."""
    config = {"assistant_only_loss": True}
    stock = run_trainer(trl.SFTTrainer, trl.SFTConfig, model, messages_data, **config)
    unmarked = tokenizer.chat_template
    for marker in ("{% generation %}", "{% endgeneration %}"):
        assert marker in unmarked
        unmarked = unmarked.replace(marker, "")
    monkeypatch.setattr(tokenizer, "chat_template", unmarked)
    ours = run_trainer(fastpost.SFTTrainer, fastpost.SFTConfig, model, messages_data, **config)
    assert_same_run(ours.trace, stock.trace)
