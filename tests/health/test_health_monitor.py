"""The monitors together, on real trainers: said once, stopped where told, reported and drawn."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import trl
from transformers import TrainerCallback, TrainerControl, TrainerState

import fastpost
from fastpost.health import (
    HealthMonitor,
    LengthDrift,
    ModeCollapse,
    NonFinite,
    OverusedOpenings,
    RewardHacking,
    ZeroVarianceGroups,
)
from fastpost.scoring import FastpostWarning
from tests.trainers.conftest import *  # noqa: F403  fixtures: tokenizer, model, data, run_trainer

GROUP = 4
END = 2  # <|im_end|> of the test tokenizer
LETTER = 70  # a token that is one letter


class GrowingAnswers(trl.GRPOTrainer):
    """Draws answers that all begin alike from step 4 on and grow by four letters a step."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        step = self.state.global_step
        length = 4 + 4 * step
        answers = []
        for i, _ in enumerate(prompt_ids):
            first = 0 if step >= 4 else i
            answers.append([LETTER + (first + k) % 20 for k in range(length + i % GROUP)] + [END])
        return answers, None


def text(completion) -> str:
    return completion[0]["content"] if isinstance(completion, list) else completion


def length_reward(completions, **columns) -> list[float]:
    return [len(text(completion)) / 10 for completion in completions]


def judge(completions, **columns) -> list[float]:
    return [1 - len(text(completion)) / 200 for completion in completions]


def constant_reward(completions, **columns) -> list[float]:
    return [1.0] * len(completions)


@pytest.fixture
def grpo(tmp_path, model, tokenizer, preference_data):
    def build(rewards, trainer_class=trl.GRPOTrainer, callbacks=(), **options):
        settings = {
            "per_device_train_batch_size": 2 * GROUP,
            "num_generations": GROUP,
            "max_completion_length": 6,
            "max_steps": 8,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        return trainer_class(
            model,
            reward_funcs=rewards,
            args=trl.GRPOConfig(str(tmp_path), **(settings | options)),
            train_dataset=preference_data.select_columns("prompt"),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )

    return build


def test_a_constant_reward_is_stopped(grpo) -> None:
    monitor = HealthMonitor([ZeroVarianceGroups(window=3, on_finding="stop")])
    trainer = grpo(constant_reward, callbacks=[monitor])
    with pytest.warns(FastpostWarning, match=r"100% of groups .* mean reward 1.*Training stops"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert [finding.action for finding in monitor.findings] == ["stop"]


def test_a_constant_reward_is_warned_of_once(grpo) -> None:
    monitor = HealthMonitor([ZeroVarianceGroups(window=2)])
    trainer = grpo(constant_reward, callbacks=[monitor], max_steps=5)
    with pytest.warns(FastpostWarning) as warned:
        trainer.train()
    ours = [w for w in warned if "fastpost health" in str(w.message)]
    assert len(ours) == 1 and "try: harder prompts" in str(ours[0].message)
    assert trainer.state.global_step == 5


def test_a_reward_that_pays_for_length(grpo, tmp_path) -> None:
    trainer = grpo([length_reward, judge], GrowingAnswers, reward_weights=[1.0, 0.0], max_steps=12)
    monitor = HealthMonitor.attach(
        trainer,
        [
            RewardHacking(trusted=("rewards/judge/mean",), window=2),
            LengthDrift(window=2),
            OverusedOpenings(pool=8, num_words=1),
            ModeCollapse(window=2, entropy_share=0.01),
        ],
    )
    with pytest.warns(FastpostWarning):
        trainer.train()
    illnesses = {finding.illness for finding in monitor.findings}
    assert {
        "reward rises while rewards/judge/mean falls",
        "completions grow",
    } <= illnesses
    report = monitor.report()
    assert "length_reward" not in report and "fastpost.rewards.length" in report
    drawn = monitor.plot(tmp_path / "folder" / "health.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")


def with_callbacks(*ours):
    class Trainer(fastpost.SFTTrainer):
        def __init__(self, *args, callbacks=(), **kwargs):
            super().__init__(*args, callbacks=[*callbacks, *ours], **kwargs)

    return Trainer


def test_nan_in_a_named_layer_of_a_model(model, prompt_completion_data, run_trainer) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    monitor = HealthMonitor([NonFinite(max_bad_steps=2)])

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.get_parameter(name)[3, 5] = math.nan

    with pytest.warns(FastpostWarning, match="fastpost health") as warned:
        trainer = run_trainer(
            with_callbacks(monitor, Spoil()),
            fastpost.SFTConfig,
            model,
            prompt_completion_data,
            max_steps=5,
        )
    assert trainer.state.global_step == 3
    assert [finding.step for finding in monitor.findings] == [2, 3]
    assert str(warned[-1].message).endswith("Training stops")
    figures = monitor.findings[-1].figures
    assert f"the weights of '{name}' are not finite" in figures
    assert "module 'model.layers.1.mlp" in figures


def test_training_on_good_data_says_nothing(model, prompt_completion_data, run_trainer) -> None:
    monitor = HealthMonitor()
    trainer_class = with_callbacks(monitor)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastpostWarning)
        run_trainer(trainer_class, fastpost.SFTConfig, model, prompt_completion_data, max_steps=8)
    report = monitor.report()
    assert report.startswith("health at step 8: 0 findings")
    assert "zero-variance groups: nothing found (never logged: zero_std_share)" in report
    assert "dead gradients: nothing found\n" in report


def test_attach_needs_completions(model, tmp_path) -> None:
    trainer = SimpleNamespace(add_callback=lambda callback: None)
    with pytest.raises(ValueError, match="SimpleNamespace keeps no completions; pass completions="):
        HealthMonitor.attach(trainer)
    given = HealthMonitor.attach(trainer, completions=lambda: ["a"])
    assert given.completions() == ["a"]


def log(monitor: HealthMonitor, step: int, is_main: bool = True, **logs) -> TrainerControl:
    control = TrainerControl()
    state = TrainerState(global_step=step, is_world_process_zero=is_main)
    monitor.on_log(SimpleNamespace(beta=0.01), state, control, logs=logs)
    return control


def test_an_illness_that_comes_back_is_said_again() -> None:
    monitor = HealthMonitor([ZeroVarianceGroups(window=1)])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step, share in enumerate([0.9, 0.9, 0.1, 0.9]):
            log(monitor, step, frac_reward_zero_std=share)
    assert len(warned) == 2 and [finding.step for finding in monitor.findings] == [0, 3]


def test_other_ranks_stop_as_well_and_say_nothing() -> None:
    monitor = HealthMonitor([ZeroVarianceGroups(window=1, on_finding="stop")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        control = log(monitor, 1, is_main=False, frac_reward_zero_std=0.9)
    assert control.should_training_stop


def test_the_same_completions_are_read_once() -> None:
    drawn = [["one two", [{"role": "assistant", "content": "three"}]]]

    class Reader:
        name = "reader"
        needs = ("completions",)
        seen: list = []  # noqa: RUF012

        def observe(self, reading):
            self.seen.append(list(reading.completions))

    monitor = HealthMonitor([Reader()], completions=lambda: drawn[0])
    log(monitor, 1, reward=1.0)
    log(monitor, 2, reward=1.0)
    log(monitor, 2, eval_reward=1.0)
    drawn[0] = ["four"]
    log(monitor, 3, reward=1.0)
    assert Reader.seen == [["one two", "three"], [], [], ["four"]]


def test_history_is_bounded_and_holds_no_texts() -> None:
    monitor = HealthMonitor([], completions=lambda: ["text"] * 9, history=5)
    for step in range(20):
        log(monitor, step, reward=1.0)
    assert [reading.step for reading in monitor.readings] == [15, 16, 17, 18, 19]
    assert not any(reading.completions for reading in monitor.readings)
    with pytest.raises(ValueError, match="history must be at least 1"):
        HealthMonitor(history=0)


def test_nothing_to_plot(tmp_path) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        HealthMonitor().plot(tmp_path / "none.png")


def test_two_monitors_do_not_share_what_they_saw() -> None:
    first, second = HealthMonitor(), HealthMonitor()
    for step in range(30):
        log(first, step, reward=1.0, frac_reward_zero_std=0.0)
    assert not second.readings
    assert all(a is not b for a, b in zip(first.monitors, second.monitors, strict=True))
