"""An adapter's file is reopened after every save: whole, finite, alive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import fastpost
from fastpost.adapters.saved import check_saved_adapter
from tests.trainers.conftest import tiny_model
from tests.trainers.methods import preference_rows, tokenizer

LAYER = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def model() -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    return get_peft_model(tiny_model(64), config)


def change(folder: Path, edit: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_a_sound_file_passes(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    check_saved_adapter(tmp_path, model, has_learnt=True)
    check_saved_adapter(tmp_path / "nothing here", model, has_learnt=True)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"base_model.model.{LAYER}.lora_A.weight"), "lacks 1 of"),
        (
            lambda t: [t.update({"_orig_mod." + k: t.pop(k)}) for k in list(t)],
            "lacks 6 .* begins with '_orig_mod",
        ),
        (
            lambda t: t[f"base_model.model.{LAYER}.lora_A.weight"].fill_(torch.nan),
            "not finite",
        ),
        (
            lambda t: t.update({f"base_model.model.{LAYER}.lora_B.weight": torch.ones(3, 2)}),
            r"saved as \(3, 2\), the model has \(64, 2\)",
        ),
        (lambda t: t[f"base_model.model.{LAYER}.lora_B.weight"].zero_(), f"dead, first '{LAYER}'"),
    ],
)
def test_a_broken_file_is_refused(model, tmp_path, edit, message: str) -> None:
    model.save_pretrained(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        check_saved_adapter(tmp_path, model, has_learnt=True)


def test_before_training_b_is_zero(tmp_path) -> None:
    model = get_peft_model(tiny_model(64), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    check_saved_adapter(tmp_path, model, has_learnt=False)
    with pytest.raises(ValueError, match="of 2 layers is dead"):
        check_saved_adapter(tmp_path, model, has_learnt=True)


def test_a_trainer_checks_what_it_saved(tmp_path) -> None:
    """A layer whose output is detached fails the run at its first save, by name."""
    trainer = fastpost.SFTTrainer(
        tiny_model(len(tokenizer())),
        args=fastpost.SFTConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=1e-2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=preference_rows()
        .rename_column("chosen", "completion")
        .remove_columns("rejected"),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "sound"))
    for name, parameter in trainer.model.named_parameters():
        if LAYER in name and "lora_B" in name:
            parameter.data.zero_()
    with pytest.raises(ValueError, match=f"dead, first '{LAYER}'"):
        trainer.save_model(str(tmp_path / "broken"))
