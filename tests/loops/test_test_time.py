"""Test-time training: it adapts, and what it adapted is afterwards bit for bit what it was."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastpost.loops.test_time import adapted
from tests.loops.conftest import user

EXAMPLES = [
    {"prompt": user(f"the code of {name}?"), "completion": code}
    for name, code in (("Ann", "xyxy"), ("Ben", "yxxy"), ("Cid", "xxyy"))
]
FAST = {"bf16": False}


def state(model: torch.nn.Module) -> dict:
    """All of a model that is worth comparing: bits, identities, modes, hooks, attributes."""
    return {
        "modules": [
            (name, id(module), type(module), module.training, sorted(module.__dict__))
            for name, module in model.named_modules()
        ],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ],
        "tensors": [
            (name, id(t), t.data_ptr(), t.requires_grad, t.detach().numpy().tobytes(), id(t.grad))
            for name, t in (*model.named_parameters(), *model.named_buffers())
        ],
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "draws": (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ),
    }


def answers_loss(model, tokenizer) -> float:
    """Mean loss on the completions alone, by the model's own forward."""
    losses = []
    for row in EXAMPLES:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False
        )
        ids = torch.tensor([prompt + tokenizer(row["completion"])["input_ids"]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=labels).loss.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_adapts_and_is_restored(model, tokenizer, mode, fails) -> None:
    getattr(model, mode)()
    model.model.layers[0].mlp.eval()  # a mixture of modes
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    model.model.norm.register_forward_hook(lambda *_: None)
    before, loss_before = state(model), answers_loss(model, tokenizer)
    try:
        with adapted(model, tokenizer, EXAMPLES, steps=10, learning_rate=1e-2, sft=FAST) as ready:
            assert answers_loss(ready, tokenizer) < loss_before - 0.5
            assert not ready.training
            assert torch.get_rng_state().tolist() == before["draws"][2]
            ready.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
            ready.train()
            if fails:
                raise KeyError("of the caller")
    except KeyError:
        assert fails
    now = state(model)
    for name in before:
        assert now[name] == before[name], name
    assert answers_loss(model, tokenizer) == loss_before


def test_it_is_restored_after_a_failure_in_training(model, tokenizer, monkeypatch) -> None:
    before = state(model)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr("fastpost.trainers.sft.SFTTrainer.training_step", fail)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        adapted(model, tokenizer, EXAMPLES, sft=FAST),
    ):
        pass
    assert state(model) == before


def test_two_users_do_not_meet(model, tokenizer) -> None:
    """Adapting to one and then to another is adapting to the other alone."""

    def loss() -> float:
        torch.manual_seed(3)
        with adapted(model, tokenizer, EXAMPLES[:1], steps=3, sft=FAST) as ready:
            return answers_loss(ready, tokenizer)

    alone = loss()
    with adapted(model, tokenizer, EXAMPLES[1:], steps=3, sft=FAST):
        pass
    assert loss() == alone


def test_what_cannot_be_adapted_is_refused(model, tokenizer) -> None:
    for options in ({"steps": 0}, {"rank": 0}, {"learning_rate": 0.0}):
        with (
            pytest.raises(ValueError, match="give at least"),
            adapted(model, tokenizer, EXAMPLES, **options),
        ):
            pass
    with (
        pytest.raises(ValueError, match="max_steps"),
        adapted(model, tokenizer, EXAMPLES, sft={"max_steps": 4}),
    ):
        pass
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    with (
        pytest.raises(ValueError, match="adapts a plain model, got PeftModel"),
        adapted(wrapped, tokenizer, EXAMPLES),
    ):
        pass
