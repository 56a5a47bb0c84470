"""`optimizer_in_backward`: the usual run bit for bit, with a layer's gradients at most."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

import fastpost
from fastpost.health.monitor import HealthMonitor
from fastpost.health.zero_variance import ZeroVarianceGroups
from fastpost.optimizer_in_backward import BackwardSteps, layer_of
from fastpost_kernels import AdamW8bit
from tests.trainers.conftest import tiny_model

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
# Name -> config fields, dtype of the weights, constructor arguments.
CASES: dict[str, tuple[dict[str, Any], torch.dtype, dict[str, Any]]] = {
    "AdamW": ({}, torch.float32, {}),
    "AdamW-fused": ({"optim": "adamw_torch_fused"}, torch.float32, {}),
    "AdamW8bit": ({"optimizer": "adamw_8bit"}, torch.bfloat16, {}),
    "AdamW8bit-checkpointing": (
        {"optimizer": "adamw_8bit", "activation_checkpointing": True},
        torch.bfloat16,
        {},
    ),
    "LoRA+": ({"lora_plus_ratio": 16.0}, torch.float32, {"peft_config": LORA}),
    "LoRA+-AdamW8bit": (
        {"lora_plus_ratio": 16.0, "optimizer": "adamw_8bit"},
        torch.float32,
        {"peft_config": LORA},
    ),
}


def rows(count: int = 8) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{i} and {i + 1}: ", "completion": f"{2 * i + 1}"} for i in range(count)]
    )


class Alive(TrainerCallback):
    """Bytes of gradients alive at any time, seen whenever one is added."""

    def __init__(self) -> None:
        self.most, self.last = 0, -1
        self.rates: list[float] = []
        self.norms: list[float] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parameters = [p for p in model.parameters() if p.requires_grad]

        def count(_: torch.Tensor) -> None:
            alive = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            self.most = max(self.most, alive)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(count)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.last = sum(p.grad is not None for p in model.parameters())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "learning_rate" in logs:
            self.rates.append(logs["learning_rate"])
            self.norms.append(logs["grad_norm"])


def build(
    folder: Path, tokenizer: Any, case: str = "AdamW", in_backward: bool = True, **options: Any
) -> Any:
    own, dtype, given = CASES[case]
    given = given | {key: options.pop(key) for key in ("optimizers", "callbacks") if key in options}
    fields = {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 1,
        "max_steps": 4,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    if "optimizer" in own:
        del fields["optim"]
    config = fastpost.SFTConfig(
        str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, optimizer_in_backward=in_backward, **fields | own | options,
    )  # fmt: skip
    model = tiny_model(len(tokenizer), num_hidden_layers=3).to(dtype)
    return fastpost.SFTTrainer(
        model=model, args=config, train_dataset=rows(), processing_class=tokenizer, **given
    )


def assert_same(one: Any, other: Any) -> None:
    """Weights and states of two trainers, bit for bit."""
    pairs = zip(one.model.named_parameters(), other.model.parameters(), strict=True)
    for (name, a), b in pairs:
        assert torch.equal(a, b), name
    states = [t.optimizer.optimizer.state_dict()["state"] for t in (one, other)]
    assert states[0].keys() == states[1].keys() and states[0]
    for index in states[0]:
        for name, value in states[0][index].items():
            assert torch.equal(value, states[1][index][name]), (index, name)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_usual_run_bit_for_bit(case: str, tokenizer: Any, tmp_path: Path) -> None:
    """Weights, states and rates; and no more than one layer's gradients are ever alive."""
    watches = []
    trainers = []
    for in_backward in (False, True):
        trainer = build(tmp_path / str(in_backward), tokenizer, case, in_backward)
        watches.append(Alive())
        trainer.add_callback(watches[-1])
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        trainers.append(trainer)
    usual, ours = trainers
    assert_same(usual, ours)
    assert any(not torch.equal(start[n], p) for n, p in ours.model.named_parameters())
    assert watches[0].rates == watches[1].rates and len(set(watches[0].rates)) > 2
    assert watches[0].norms == pytest.approx(watches[1].norms, rel=1e-2)  # usual: of bf16 in bf16
    layers: dict[str, int] = {}
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            layers[layer_of(name)] = layers.get(layer_of(name), 0) + parameter.nbytes
    assert watches[1].most <= max(layers.values()) < watches[0].most == sum(layers.values())
    assert watches[1].last == 0 < watches[0].last


def test_a_resumed_run_is_the_run_left_alone(tokenizer: Any, tmp_path: Path) -> None:
    """Also where one of the two is a usual one: checkpoints are the same."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = build(tmp_path / "whole", tokenizer, "AdamW8bit", False, **saving)
    whole.train()
    first = build(tmp_path / "first", tokenizer, "AdamW8bit", **saving)
    first.train()
    for name, source in (("from usual", "whole"), ("from ours", "first")):
        shutil.copytree(tmp_path / source / "checkpoint-2", tmp_path / name / "checkpoint-2")
        again = build(tmp_path / name, tokenizer, "AdamW8bit", **saving)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 4
        assert_same(whole, again)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=0.0"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=False"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint=False"),
        ({"optim": "sgd"}, "adamw_torch"),
        ({"callbacks": [HealthMonitor()]}, "without it"),
    ],
)
def test_refusals(options: dict[str, Any], words: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as error:
        build(tmp_path, tokenizer, **options)
    assert "optimizer_in_backward" in str(error.value)


def test_averaging_over_processes_is_refused(tokenizer: Any, tmp_path: Path, monkeypatch) -> None:
    from accelerate.state import DistributedType

    from fastpost.optimizer_in_backward import refuse_surroundings

    trainer = build(tmp_path, tokenizer)
    trainer.accelerator.state.distributed_type = DistributedType.MULTI_CPU
    try:
        with pytest.raises(ValueError, match="FSDP2"):
            refuse_surroundings(trainer)
    finally:
        trainer.accelerator.state.distributed_type = DistributedType.NO


def test_another_optimizer_is_refused_when_it_is_there(tokenizer: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path, tokenizer)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="SGD"):
        trainer.train()


def test_monitors_see_gradients_and_a_later_run_keeps_its_own(
    tokenizer: Any, tmp_path: Path
) -> None:
    """A census reads each gradient before it is freed; hooks go when training ends."""
    from fastpost.health.dead_gradients import DeadGradients

    trainer = build(tmp_path, tokenizer)
    monitor = HealthMonitor([DeadGradients(), ZeroVarianceGroups()])
    trainer.add_callback(monitor)
    trainer.train()
    assert not monitor.findings
    model = trainer.model
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})


def test_a_second_gradient_in_a_step_is_an_error() -> None:
    model = net()
    steps = BackwardSteps(model, AdamW8bit(model.parameters()))
    model["a"](torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"a\.\w+ got a second gradient"):
        model["a"](torch.ones(1, 3)).sum().backward()
    steps.begin()
    model["a"](torch.ones(1, 3)).sum().backward()


def test_what_the_first_backward_left_out_is_named() -> None:
    model = net()
    steps = BackwardSteps(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    (model["a"](torch.ones(1, 3)).sum() * torch.inf).backward()
    model["b"].weight.sum().backward()
    assert steps.gradient_norm().isinf()
    assert steps.tensors_without_gradient() == ["a.weight", "a.bias", "b.bias"]


def test_a_layer_without_all_gradients_is_stepped_by_the_trainers_own_call() -> None:
    """Of a layer whose bias is not used the weight's gradient waits for `step`."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(3, 3)])})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    BackwardSteps(model, optimizer)
    linear = model["layers"][0]
    before = linear.weight.detach().clone()
    linear.weight.sum().backward()
    assert torch.equal(before, linear.weight) and linear.weight.grad is not None
    optimizer.step()
    assert not torch.equal(before, linear.weight)
