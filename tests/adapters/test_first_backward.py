"""An adapter's tensors that get no gradient are named after the first step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastpost
from fastpost.adapters.first_backward import tensors_without_gradient
from fastpost.backbone import FastpostWarning
from tests.trainers.conftest import tiny_model
from tests.trainers.methods import prompt_completion_rows, tokenizer

NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"


def test_names_what_is_missing_or_not_finite() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model: Any = get_peft_model(tiny_model(64), config)
    assert len(tensors_without_gradient(model)) == 4
    model(torch.arange(8)[None]).logits.sum().backward()
    assert tensors_without_gradient(model) == []
    gradients = dict(model.named_parameters())
    gradients[NAME].grad[0, 0] = torch.inf
    assert tensors_without_gradient(model) == [NAME]


@pytest.mark.parametrize("is_detached", [False, True])
def test_a_trainer_says_so(tmp_path, is_detached: bool) -> None:
    trainer = fastpost.SFTTrainer(
        tiny_model(len(tokenizer())),
        args=fastpost.SFTConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=prompt_completion_rows(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"]),
    )
    if is_detached:
        layer = trainer.model.base_model.model.model.layers[1].self_attn.q_proj
        layer.register_forward_hook(lambda module, inputs, output: output.detach())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if issubclass(w.category, FastpostWarning)]
    said = [text for text in said if "first backward" in text]
    assert len(said) == is_detached
    assert not is_detached or ("2 trained tensors" in said[0] and NAME in said[0])
