"""`reference` in the methods that sample: what it takes, and what it says at start."""

from __future__ import annotations

import logging

import pytest
from peft import LoraConfig

import fastpost

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
CONFIG = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}


def short(completions, **columns) -> list[float]:
    return [-float(len(str(completion))) for completion in completions]


def build(name, folder, model, data, tokenizer, peft_config=None, **config):
    if name in ("GRPO", "RLOO"):
        config["per_device_train_batch_size"] = config["num_generations"] = 2
    args = getattr(fastpost, f"{name}Config")(str(folder), **CONFIG, **config)
    return getattr(fastpost, f"{name}Trainer")(
        model=model,
        reward_funcs=short,
        args=args,
        train_dataset=data.select_columns(["prompt"]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.fixture
def saved(tmp_path, model):
    """The model at a path, as TRL loads references from there."""
    model.save_pretrained(tmp_path / "model")
    return type(model).from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "weight"), [("GRPO", "beta"), ("RLOO", "beta"), ("PPO", "kl_coef")]
)
def test_what_is_used_is_said(
    name, weight, tmp_path, saved, preference_data, tokenizer, caplog
) -> None:
    def start(beta, **options):
        options[weight] = beta
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fastpost"):
            build(name, tmp_path, saved, preference_data, tokenizer, **options)
        return [r.message for r in caplog.records if r.message.startswith("reference:")]

    assert start(beta=0.0, reference="none") == [f"reference: none, {weight} is 0"]
    (frozen,) = start(beta=0.1, reference="frozen")
    assert "frozen copy of" in frozen
    with pytest.raises(ValueError, match=f"contradicts {weight}"):
        start(beta=0.1, reference="none")
    with pytest.raises(ValueError, match="not possible"):
        start(beta=0.1, reference="cached")
    with pytest.raises(ValueError, match=r"not possible|no adapter"):
        start(beta=0.1, reference="base")
    assert start(beta=0.1, reference="base", peft_config=LORA) == [
        "reference: adapter switched off"
    ]


def test_online_dpo_takes_a_second_model_beside_an_adapter(
    tmp_path, saved, preference_data, tokenizer
) -> None:
    trainer = build(
        "OnlineDPO",
        tmp_path,
        saved,
        preference_data,
        tokenizer,
        peft_config=LORA,
        reference="frozen",
        max_new_tokens=4,
    )
    assert trainer.ref_model is not None and trainer.ref_engine is not None
    with pytest.raises(ValueError, match="no adapter"):
        build("OnlineDPO", tmp_path, saved, preference_data, tokenizer, reference="base")
