"""`optimizer="adamw_8bit"` of a configuration: groups, refusals, resumption, learning."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import fastpost
from fastpost_kernels import AdamW8bit
from tests.trainers.conftest import tiny_model

FAST = {"learning_rate": 1e-2, "weight_decay": 0.1, "optimizer": "adamw_8bit", "max_steps": 4}


def rows(count: int = 8) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{i} and {i + 1}: ", "completion": f"{2 * i + 1}"} for i in range(count)]
    )


def build(folder: Path, tokenizer: Any, model: Any = None, **options: Any) -> Any:
    given = {key: options.pop(key) for key in ("peft_config", "optimizers") if key in options}
    config = fastpost.SFTConfig(
        str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, **{**FAST, **options},
    )  # fmt: skip
    return fastpost.SFTTrainer(
        model=tiny_model(len(tokenizer)) if model is None else model,
        args=config,
        train_dataset=rows(),
        processing_class=tokenizer,
        **given,
    )


def test_groups_are_those_of_transformers(tokenizer: Any, tmp_path: Path) -> None:
    ours = build(tmp_path, tokenizer, seed=5)
    theirs = build(tmp_path, tokenizer, optimizer=None)
    made, stock = ours.create_optimizer(), theirs.create_optimizer()
    assert type(made) is AdamW8bit and made.param_groups[0]["seed"] == 5
    for a, b in zip(made.param_groups, stock.param_groups, strict=True):
        assert len(a["params"]) == len(b["params"])
        for name in ("lr", "betas", "eps", "weight_decay"):
            assert a[name] == b[name], name


def test_lora_plus_splits_its_groups(tokenizer: Any, tmp_path: Path) -> None:
    lora = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = build(tmp_path, tokenizer, peft_config=lora, lora_plus_ratio=16.0)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    rates = {group["initial_lr"] for group in optimizer.param_groups if group["params"]}
    assert rates == {FAST["learning_rate"], 16 * FAST["learning_rate"]}
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32, torch.uint8}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adam"}, "adamw_8bit"),
        ({"optim": "sgd"}, "two optimizers"),
        ({"optim_args": "fused=True"}, "two optimizers"),
    ],
)
def test_refusals(options: dict[str, Any], words: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        build(tmp_path, tokenizer, **options)


def test_an_optimizer_given_as_well_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(len(tokenizer))
    stock = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = build(tmp_path, tokenizer, model, optimizers=(stock, None))
    with pytest.raises(ValueError, match="leave one of them out"):
        trainer.train()


def test_a_resumed_run_is_the_run_left_alone(tokenizer: Any, tmp_path: Path) -> None:
    """Weights in bf16 too: the random rounding goes on where it stopped."""

    def run(folder: Path) -> Any:
        model = tiny_model(len(tokenizer)).to(torch.bfloat16)
        return build(folder, tokenizer, model, save_strategy="steps", save_steps=2)

    whole = run(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = run(tmp_path / "again")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    states = [t.optimizer.optimizer.state_dict()["state"] for t in (whole, again)]
    assert states[0].keys() == states[1].keys()
    for index in states[0]:
        for name, value in states[0][index].items():
            other = states[1][index][name]
            assert value.dtype == other.dtype and torch.equal(value, other), (index, name)


def _losses(optimizer_class: Any, dtype: torch.dtype, data: int, **options: Any) -> list[float]:
    """Of a small Llama that learns to repeat a sequence of 8 symbols of 32."""
    model = tiny_model(32, seed=0, initializer_range=0.05).to(dtype)
    optimizer = optimizer_class(model.parameters(), lr=2e-3, weight_decay=0.0, **options)
    generator = torch.Generator().manual_seed(data)
    losses = []
    for step in range(300):
        half = torch.randint(3, 32, (32, 8), generator=generator)
        ids = torch.cat([half, half], 1)
        labels = ids.clone()
        labels[:, :8] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / 300)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
def test_bf16_weights_with_8_bits_learn_as_fp32() -> None:
    """The mean loss of the last 50 steps, against that of fp32 weights with fp32 states."""

    def end(losses: list[float]) -> float:
        return sum(losses[-50:]) / 50

    exact = [end(_losses(torch.optim.AdamW, torch.float32, seed)) for seed in (1, 2)]
    ours = end(_losses(AdamW8bit, torch.bfloat16, 1, seed=3))
    nearest = end(_losses(AdamW8bit, torch.bfloat16, 1, stochastic_rounding=False))
    print(
        f"\nfp32 AdamW {exact[0]:.4f} and {exact[1]:.4f} on other data; bf16, 8-bit states: "
        f"{ours:.4f} rounded at random, {nearest:.4f} to nearest"
    )
    assert max(exact) < 1.5
    assert ours <= max(exact) + 0.1
