"""The reference is another model than the policy, and stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import fastpost
from fastpost.guards.reference import fingerprint, refuse_shared_reference
from fastpost.scoring import FastpostWarning
from tests.trainers.conftest import *  # noqa: F403  fixtures: model, tokenizer, data, run_trainer
from tests.trainers.conftest import tiny_model


def test_same_object_is_refused_at_construction(
    model, preference_data, run_trainer, tmp_path
) -> None:
    args = fastpost.DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="ref_model is the same object as model"):
        fastpost.DPOTrainer(model, model, args, train_dataset=preference_data)


def test_shared_weights_are_refused_by_name(model, preference_data, tmp_path) -> None:
    reference = copy.deepcopy(model)
    reference.model.layers[1].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        refuse_shared_reference(model, reference)
    refuse_shared_reference(model, copy.deepcopy(model))


def test_fingerprint_sees_one_bit() -> None:
    layer = nn.Linear(7, 5).bfloat16()
    before = fingerprint(layer.named_parameters())
    assert fingerprint(layer.named_parameters()) == before
    with torch.no_grad():
        layer.weight.view(torch.int16)[3, 2] ^= 1
    after = fingerprint(layer.named_parameters())
    assert after["weight"] != before["weight"] and after["bias"] == before["bias"]


class Meddle(TrainerCallback):
    def __init__(self, tensor):
        self.tensor = tensor

    def on_step_end(self, *args, **kwargs):
        with torch.no_grad():
            self.tensor.add_(1e-3)


def test_a_changed_reference_fails_the_run(model, preference_data, tokenizer, tmp_path) -> None:
    reference = copy.deepcopy(model)
    args = fastpost.DPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=1, report_to=[], save_strategy="no"
    )
    trainer = fastpost.DPOTrainer(
        model, reference, args, train_dataset=preference_data, processing_class=tokenizer
    )
    trainer.add_callback(Meddle(reference.model.norm.weight))
    with pytest.raises(RuntimeError, match=r"reference model changed .*model\.norm\.weight"):
        trainer.train()


def test_frozen_base_under_lora_is_the_reference(
    model, preference_data, tokenizer, tmp_path
) -> None:
    from peft import LoraConfig

    args = fastpost.DPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=1, report_to=[], save_strategy="no"
    )
    trainer = fastpost.DPOTrainer(
        model,
        args=args,
        train_dataset=preference_data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    base = trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    trainer.add_callback(Meddle(base))
    with pytest.raises(RuntimeError, match=r"reference model changed .*up_proj"):
        trainer.train()


def test_first_step_reports_another_reference(model, preference_data, run_trainer) -> None:
    trainer = run_trainer(
        fastpost.DPOTrainer,
        fastpost.DPOConfig,
        model,
        preference_data,
        trainer_options={"ref_model": tiny_model(model.config.vocab_size, seed=5)},
        max_steps=1,
    )
    assert trainer.first_step.startswith("policy differs from reference")


def test_first_step_warns_where_they_should_agree(model, preference_data, run_trainer) -> None:
    """Dropout left on separates the policy from its own reference."""
    from peft import LoraConfig

    lora = LoraConfig(
        r=4,
        lora_dropout=0.5,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with pytest.warns(FastpostWarning, match="should find policy and reference equal"):
        run_trainer(
            fastpost.DPOTrainer,
            fastpost.DPOConfig,
            model,
            preference_data,
            trainer_options={"peft_config": lora},
            max_steps=1,
            disable_dropout=False,
        )
