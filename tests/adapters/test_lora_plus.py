"""LoRA+ groups of any optimizer, in a trainer from its configuration to its log."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

import fastpost
from fastpost.adapters.lora_plus import require_lora_b, split_groups
from fastpost.adapters.preset import best_adapter
from tests.trainers.conftest import tiny_model
from tests.trainers.methods import preference_rows, tokenizer


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.embed(ids)))


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    targets = ["embed", "first", "second"]
    return get_peft_model(Two(), LoraConfig(r=2, target_modules=targets, **options))


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_only_b_learns_faster(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Magnitudes, A, and weights outside of adapters keep the base rate; so does decay."""
    model = adapted(use_dora=True)
    model.base_model.model.first.base_layer.bias.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    half = len(trained) // 2
    groups = [{"params": trained[:half], "weight_decay": 0.1}, {"params": trained[half:]}]
    optimizer = optimizer_class(groups, lr=0.25, weight_decay=0.0)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    fresh = split_groups(optimizer, model, 16)
    assert fresh == [2, 3]
    for name, rate in rates(optimizer, model).items():
        assert rate == (4.0 if "lora_B" in name or "embedding_B" in name else 0.25), name
    assert len(rates(optimizer, model)) == len(trained)
    for group in optimizer.param_groups:
        assert all(decay[id(p)] == group["weight_decay"] for p in group["params"])
    with pytest.raises(ValueError, match="state already"):
        optimizer.state[trained[0]] = {"step": 1}
        split_groups(optimizer, model, 16)


def test_refuses_what_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match=r"at least 1, got 0\.5"):
        require_lora_b(adapted(), 0.5)
    with pytest.raises(ValueError, match="trains no LoRA matrix B"):
        require_lora_b(Two(), 16)


def train(folder: Any, ratio: float | None, **options: Any) -> Any:
    data: Dataset = preference_rows()
    trainer = fastpost.DPOTrainer(
        tiny_model(len(tokenizer())),
        args=fastpost.DPOConfig(
            str(folder),
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            lora_plus_ratio=ratio,
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer(),
        **({"peft_config": LoraConfig(r=2, target_modules=["q_proj", "up_proj"])} | options),
    )
    trainer.train()
    return trainer


def adapters_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in trainer.model.named_parameters() if "lora" in n}


def test_a_trainer_takes_it(tmp_path) -> None:
    """Ratio 1 is plain LoRA to the bit; 16 moves B further and is logged."""
    plain, one, sixteen = (
        train(tmp_path / str(i), ratio) for i, ratio in enumerate((None, 1.0, 16.0))
    )
    for name, value in adapters_of(plain).items():
        assert torch.equal(adapters_of(one)[name], value), name
    moved = [
        sum(float(p.abs().sum()) for n, p in adapters_of(trainer).items() if "lora_B" in n)
        for trainer in (plain, sixteen)
    ]
    assert moved[1] > 8 * moved[0]
    logs = [line for line in sixteen.state.log_history if "learning_rate" in line]
    assert [line["learning_rate_lora_B"] for line in logs] == [0.16] * 3
    assert all("learning_rate_lora_B" not in line for line in plain.state.log_history)


def test_a_run_without_an_adapter_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="trains no LoRA matrix B"):
        train(tmp_path, 16.0, peft_config=None, ref_model=tiny_model(len(tokenizer())))


def test_the_preset_trains(tmp_path) -> None:
    config = best_adapter(r=2)
    assert config.use_dora and config.target_modules == "all-linear" and config.r == 2
    assert best_adapter().to_dict()["lora_alpha"] == 64
    trainer = train(tmp_path, 16.0, peft_config=config)
    assert sum("magnitude" in name for name in adapters_of(trainer)) == 14
    assert "adapted layers on PEFT's own forward" not in trainer.engine.report()
    with pytest.raises(TypeError):
        best_adapter(rank=3)
