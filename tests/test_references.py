"""The reference asked for by name is the one used, and it is said; contradictions are refused."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastpost
from fastpost.references import check_reference, describe_reference
from fastpost.scoring import FastpostWarning
from tests.trainers import methods
from tests.trainers.methods import causal_model, preference_rows

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPOST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def make(model: Any = None, options: dict[str, Any] | None = None, **config: Any) -> Any:
        settings = methods.settings_of(methods.METHODS["DPO"], tmp_path / "run", **config)
        return fastpost.DPOTrainer(
            causal_model() if model is None else model,
            args=fastpost.DPOConfig(**settings),
            train_dataset=preference_rows(),
            processing_class=copy.deepcopy(methods.tokenizer()),
            **(options or {}),
        )

    return make


def trained_adapter() -> Any:
    """A policy whose adapter has been trained before."""
    model = get_peft_model(causal_model(), LORA)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def first_rewards(trainer: Any) -> float:
    """Largest |reward| of the first step: 0 where policy and reference are equal."""
    trainer.args.max_steps = 1
    trainer.train()
    log = trainer.state.log_history[0]
    return max(abs(log["rewards/chosen"]), abs(log["rewards/rejected"]))


def test_base_is_the_policy_without_its_adapter(make: Any, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "fastpost")
    trainer = make(options={"peft_config": LORA}, reference="base")
    assert trainer.ref_model is None and first_rewards(trainer) < 1e-5
    assert "reference: adapter switched off" in caplog.messages


def test_base_is_without_an_adapter_that_was_given(make: Any) -> None:
    """TRL's own choice there is a frozen copy of the adapter, from which the policy starts."""
    stock = make(trained_adapter())
    assert describe_reference(stock).startswith("the adapter as it was given")
    assert first_rewards(stock) < 1e-5
    warnings.simplefilter("error", FastpostWarning)
    ours = make(trained_adapter(), reference="base")
    assert describe_reference(ours) == "adapter switched off"
    assert first_rewards(ours) > 1e-2


def test_frozen_is_a_second_model(make: Any, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "fastpost")
    policy = causal_model()
    trainer = make(policy, reference="frozen")
    count = sum(p.numel() for p in policy.parameters())
    assert f"reference: frozen copy of LlamaForCausalLM, {count:,} parameters" in caplog.messages
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    assert first_rewards(trainer) < 1e-5
    assert trainer.ref_engine.model is trainer.accelerator.unwrap_model(trainer.ref_model)
    before = dict(causal_model().named_parameters())
    for name, parameter in trainer.ref_model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    moved = dict(trainer.model.named_parameters())
    assert any(not torch.equal(parameter, before[name]) for name, parameter in moved.items())


def test_frozen_beside_an_adapter(make: Any) -> None:
    new = make(options={"peft_config": LORA}, reference="frozen")
    assert new.ref_model is not None and first_rewards(new) < 1e-5
    given = make(trained_adapter(), reference="frozen")
    assert given.ref_model is not None and first_rewards(given) < 1e-5


def test_frozen_by_name_beside_an_adapter(make: Any, tmp_path: Path) -> None:
    path = str(methods.saved_model("DPO", tmp_path))
    trainer = make(path, options={"peft_config": LORA}, reference="frozen")
    assert describe_reference(trainer).startswith(f"frozen copy of {path}, ")
    assert first_rewards(trainer) < 1e-5


def test_a_reference_that_is_given_is_taken(make: Any) -> None:
    other = causal_model(seed=1)
    trainer = make(options={"ref_model": other}, reference="frozen")
    assert trainer.accelerator.unwrap_model(trainer.ref_model) is other
    assert first_rewards(trainer) > 1e-2


def test_a_reference_that_follows_is_named_so(make: Any) -> None:
    trainer = make(options={"ref_model": causal_model()}, sync_ref_model=True)
    assert describe_reference(trainer).startswith("copy that follows the policy of Llama")


@pytest.mark.parametrize("options", [{}, {"peft_config": LORA}], ids=["full", "adapter"])
def test_cached_is_said_with_its_rows(make: Any, caplog: Any, options: Any) -> None:
    caplog.set_level(logging.WARNING, "fastpost")
    trainer = make(options=options, reference="cached")
    assert f"reference: {trainer.reference_report}" in caplog.messages
    assert str(trainer.reference_report).startswith("cached, 24 rows (24 computed now), sha ")
    assert trainer.ref_model is None and first_rewards(trainer) < 1e-5


def test_a_cached_copy_of_an_adapter_is_of_that_adapter(make: Any) -> None:
    assert first_rewards(make(trained_adapter(), reference="cached")) < 1e-5


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({}, {"reference": "base"}, "policy has no adapter"),
        ({}, {"reference": "none"}, "not possible for DPO"),
        ({}, {"reference": "copy"}, "must be one of base, frozen, cached, none"),
        (
            {"peft_config": LORA, "ref_model": "given"},
            {"reference": "base"},
            "ref_model was passed",
        ),
        (
            {},
            {"reference": "frozen", "precompute_ref_log_probs": True},
            "contradicts precompute_ref_log_probs",
        ),
        ({}, {"reference": "cached", "sync_ref_model": True}, "sync_ref_model"),
    ],
    ids=["base", "none", "unknown", "two", "both", "follows"],
)
def test_contradictions_are_refused(
    options: dict[str, Any], config: dict[str, Any], message: str, make: Any
) -> None:
    if "ref_model" in options:
        options = options | {"ref_model": causal_model(seed=1)}
    with pytest.raises(ValueError, match=message):
        make(options=options, **config)


@pytest.mark.parametrize(
    ("kind", "beta", "is_allowed"),
    [("none", 0.0, True), ("none", 0.1, False), ("base", 0.1, True), ("base", 0.0, False)],
)
@pytest.mark.parametrize("name", ["beta", "kl_coef"])
def test_no_reference_goes_with_weight_zero(
    kind: str, beta: float, is_allowed: bool, name: str
) -> None:
    args = SimpleNamespace(reference=kind, **{name: beta})

    def check() -> None:
        check_reference(args, "GRPO", ("base", "frozen", "none"), adapter=True)

    if is_allowed:
        check()
    else:
        with pytest.raises(ValueError, match=f"{name}="):
            check()
