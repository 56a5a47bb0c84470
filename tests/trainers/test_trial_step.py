"""The trial step: taken back bit for bit, and what it says of memory."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from fastpost.planning.request import Adapter
from fastpost.trainers import trial_plan, trial_step
from fastpost.trainers.trial_step import Trial, TrialStep
from tests.trainers import methods
from tests.trainers.methods import METHODS

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
# Case -> method, config fields, constructor arguments.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SFT": ("SFT", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}, {}),
    "SFT, dropout, 8 bits": ("SFT", {"optimizer": "adamw_8bit", "packing": True}, {}),
    "SFT, in backward": ("SFT", {"optimizer_in_backward": True}, {}),
    "DPO, LoRA": ("DPO", {}, {"peft_config": LORA, "ref_model": None}),
    "Reward": ("Reward", {}, {}),
    "GRPO": ("GRPO", {}, {}),
    "RLOO, LoRA": ("RLOO", {}, {"peft_config": LORA}),
}


CHECKPOINTED = {"gradient_checkpointing": True}


class Before(TrainerCallback):
    """What there is when the trial is over and before any batch is drawn."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.state: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        model, optimizer = trainer.model, trainer.optimizer.optimizer
        self.state = {
            "weights": {n: t.detach().clone() for n, t in model.state_dict().items()},
            "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "random": (
                torch.get_rng_state(),
                random.getstate(),
                np.random.get_state()[1].tolist(),
            ),
            "stats": vars(trainer.engine.stats).copy(),
            "metrics": copy.deepcopy(getattr(trainer, "_metrics", None)),
            "first_step": vars(trainer).get("first_step"),
        }


def run(case: str, tmp_path: Any, trial: bool, **more: Any) -> Any:
    name, config, arguments = CASES[case]
    method = METHODS[name]
    settings = methods.settings_of(
        method, tmp_path / str(trial), max_steps=2, trial_step=trial, **config, **more
    )
    dropout = {"attention_dropout": 0.1} if "dropout" in case else {}
    arguments = copy.deepcopy(arguments)
    if "reward_funcs" in method.options(torch.float32):
        arguments = method.options(torch.float32) | arguments
    trainer = methods.build_trainer(method, settings, method.model(**dropout), **arguments)
    before = Before()
    before.trainer = trainer
    trainer.add_callback(before)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    trainer.train()
    return trainer, before.state


def trial_of(trainer: Any) -> Trial:
    callbacks = trainer.callback_handler.callbacks
    found = next(c for c in callbacks if isinstance(c, TrialStep)).found
    assert found is not None
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_trial_is_taken_back(case: str, tmp_path, monkeypatch) -> None:
    if case != "DPO, LoRA":  # one is planned for real, which takes seconds
        monkeypatch.setattr(trial_step, "predicted_bytes", lambda *_: (None, "not asked"))
    tried, after = run(case, tmp_path, True)
    plain, before = run(case, tmp_path, False)
    found = trial_of(tried)
    assert found.measured > sum(p.numel() for p in tried.model.parameters())
    for name, weight in before["weights"].items():
        assert torch.equal(after["weights"][name], weight), name
    assert after["gradients"] == before["gradients"] == []
    assert after["optimizer"] == before["optimizer"] and not after["optimizer"]["state"]
    for one, other in zip(after["random"], before["random"], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    for name in ("stats", "metrics", "first_step"):
        assert after[name] == before[name]
    # and so the runs are the same, to the last bit
    assert tried.trace.losses == plain.trace.losses and tried.trace.losses
    for name, weight in plain.trace.weights.items():
        assert torch.equal(tried.trace.weights[name], weight), name


@pytest.mark.parametrize("case", ["SFT", "Reward", "RLOO, LoRA"])
def test_the_planner_is_asked_what_the_trainer_runs(case: str, tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(trial_plan, "trace_composed", lambda *args, **_: asked.append(args))
    with pytest.raises(AttributeError):  # nothing was traced
        run(case, tmp_path, True, gradient_checkpointing=True)
    request, config = asked[0]
    assert config.hidden_size == 64 and request.checkpointing
    rows = {"SFT": 2, "Reward": 1, "RLOO, LoRA": 1}[case]
    assert (request.rows, request.accumulation) == (4, rows)
    assert request.precision == "fp32" and request.optimizer == "adamw"
    if case == "RLOO, LoRA":
        assert request.adapter == Adapter("lora", 4)
        assert (request.method, request.beta, request.group) == ("rloo", 0.05, 2)
        longest = max(len(ids) for ids in prompts_of())
        assert (request.num_prompt, request.seq) == (longest, longest + 8)


def prompts_of() -> list[list[int]]:
    tokenizer = methods.tokenizer()
    return [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for row in methods.prompt_rows()
    ]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"optim": "adafactor"}, "optim is adafactor"),
        ({"activation_checkpointing_kwargs": {"every_n_layers": 2}} | CHECKPOINTED, "every_n"),
    ],
)
def test_what_is_not_planned_is_measured_all_the_same(fields, reason, tmp_path) -> None:
    trainer, _ = run("RLOO, LoRA", tmp_path, True, **fields)
    found = trial_of(trainer)
    assert found.predicted is None and reason in found.reason and found.measured > 0
    assert f"not predicted ({found.reason}), measured" in str(found)


def test_streams_and_loss_scales_are_refused(tmp_path) -> None:
    method = METHODS["SFT"]
    settings = methods.settings_of(method, tmp_path, trial_step=True)
    data = method.data().to_iterable_dataset()
    with pytest.raises(ValueError, match="streamed"):
        methods.build_trainer(method, settings, method.model(), data)


def test_memory_that_runs_out_says_where_and_what_was_predicted(tmp_path, monkeypatch) -> None:
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial_step, "_steps", run_out)
    monkeypatch.setattr(trial_step, "predicted_bytes", lambda *_: (3 * 2**30, ""))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run("SFT", tmp_path, True)
    assert "before any data was trained on; 3.00 GiB were predicted" in caught.value.__notes__[0]
