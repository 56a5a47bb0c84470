"""Dead and non-finite gradients are found by name, before clipping hides them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import Trainer, TrainingArguments

from fastpost.health import DeadGradients, HealthMonitor, NonFinite
from fastpost.health.activation_trace import ActivationTrace
from fastpost.health.gradient_census import (
    GradientCensus,
    GradientReport,
    GradientState,
    largest_magnitude,
)
from fastpost.scoring import FastpostWarning

ALIVE, ZERO, ABSENT, BAD = (
    GradientState.ALIVE,
    GradientState.ZERO,
    GradientState.ABSENT,
    GradientState.NON_FINITE,
)


class Chain(nn.Module):
    """Three linear layers and one that nothing uses; NaN can be put in at two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.unused = nn.Linear(4, 4, bias=False)
        self.bad_steps: set[int] = set()
        self.breaks_forward = True
        self.calls = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        self.calls += 1
        hidden = self.second(self.first(x).tanh())
        if self.calls in self.bad_steps:
            if self.breaks_forward:
                hidden = hidden * math.nan
            else:
                hidden.register_hook(lambda gradient: gradient * math.nan)
        loss = self.third(hidden).square().mean()
        return {"loss": loss}


def trainer(folder: Path, model: nn.Module, monitor: HealthMonitor, **options) -> Trainer:
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.1,
    }
    data = [{"x": torch.ones(4), "labels": torch.ones(1)} for _ in range(32)]
    return Trainer(
        model,
        TrainingArguments(str(folder), **(settings | options)),
        train_dataset=data,
        callbacks=[monitor],
    )


def report(step: int = 1, rate: float | None = None, **states: GradientState) -> GradientReport:
    return GradientReport(step, states, rate)


def test_census_tells_the_four_states_apart_and_forgets() -> None:
    model = Chain()
    model.third.weight.requires_grad_(False)
    census = GradientCensus(model)
    x = torch.ones(1, 4)
    (0 * model.first(x) + model.second(x)).sum().backward()
    states = {
        "first.weight": ZERO,
        "second.weight": ALIVE,
        "unused.weight": ABSENT,
    }
    assert census.read(1).states == states
    assert set(census.read(2).states.values()) == {ABSENT}
    (model.first(x) / 0).sum().backward()
    assert census.read(3).names(BAD) == ["first.weight"]
    census.remove()
    model.zero_grad()
    model.second(x).sum().backward()
    assert set(census.read(4).states.values()) == {ABSENT}


@pytest.mark.parametrize(
    ("values", "largest"),
    [([1.0, -3.0], 3.0), ([0.0, -0.0], 0.0), ([1.0, -math.inf], math.inf), ([math.inf], math.inf)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_largest_magnitude(values, largest, dtype) -> None:
    assert largest_magnitude(torch.tensor(values, dtype=dtype)).item() == largest
    with_nan = torch.tensor([*values, math.nan], dtype=dtype)
    assert math.isnan(largest_magnitude(with_nan).item())


def _rank(rank: int, file: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = Chain()
    census = GradientCensus(model)
    x = torch.ones(1, 4)
    layer = model.first if rank == 0 else model.second
    ((layer(x) * (math.nan if rank == 1 else 1)).sum()).backward()
    torch.save(census.read(1).states, f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree(tmp_path) -> None:
    mp.spawn(_rank, (str(tmp_path / "meet"), str(tmp_path / "states")), nprocs=2)
    states = [torch.load(tmp_path / f"states.{rank}", weights_only=False) for rank in range(2)]
    assert states[0] == states[1]
    assert states[0]["first.weight"] == ALIVE and states[0]["second.weight"] == BAD
    assert states[0]["third.weight"] == ABSENT


def test_dead_gradients_by_name_with_how_they_are_dead() -> None:
    monitor = DeadGradients(steps=3)
    for step in (1, 2):
        assert monitor.observe(report(step, a=ALIVE, b=ZERO, c=ABSENT, d=ZERO)) is None
    found = monitor.observe(report(3, a=ALIVE, b=ZERO, c=ABSENT, d=ALIVE))
    assert found is not None and found.step == 3
    assert "2 of 4 in each of the first 3 steps: 'b' (zero), 'c' (none)" in found.figures
    assert monitor.is_done and monitor.observe(report(4, a=ABSENT)) is None


def test_a_gradient_that_comes_late_is_alive() -> None:
    """LoRA's A: zero until B has moved, which a warm-up from learning rate 0 delays."""
    monitor = DeadGradients(steps=2)
    history = [report(1, 0.0, a=ZERO), report(2, 0.1, a=ZERO), report(3, 0.1, a=ALIVE)]
    assert [monitor.observe(one) for one in history] == [None] * 3
    assert monitor.is_done


def test_no_gradient_anywhere_has_another_remedy() -> None:
    found = DeadGradients(steps=1).observe(report(a=ZERO, b=ABSENT))
    assert found.illness == "no tensor gets a gradient" and "scored" in found.fix


def test_many_dead_tensors_are_counted_not_listed() -> None:
    states = {f"layer{i}": ZERO for i in range(9)} | {"head": ALIVE}
    figures = DeadGradients(steps=1).observe(report(**states)).figures
    assert "'layer3'" in figures and "'layer4'" not in figures and "and 5 more" in figures


def test_bad_steps_are_counted_in_a_window() -> None:
    monitor = NonFinite(max_bad_steps=2, window=3)
    states = [BAD, ALIVE, ALIVE, BAD, BAD]
    found = [monitor.observe(report(i, a=state)) for i, state in enumerate(states)]
    assert [finding.action if finding else None for finding in found] == [
        "warn",
        None,
        None,
        "warn",
        "stop",
    ]
    assert "bad step 2 against 2 in 3" in found[-1].figures
    never = NonFinite(max_bad_steps=1, on_finding="warn")
    assert never.observe(report(a=BAD)).action == "warn"
    with pytest.raises(ValueError, match="max_bad_steps is 4; give 1 to window"):
        NonFinite(max_bad_steps=4, window=3)


def test_dead_layer_in_a_run(tmp_path) -> None:
    monitor = HealthMonitor([DeadGradients(steps=2)])
    with pytest.warns(FastpostWarning, match=r"1 of 4 .*'unused\.weight' \(none\)"):
        trainer(tmp_path, Chain(), monitor, max_steps=3).train()
    assert monitor._census is None  # nothing left to see, nothing left to pay


def test_a_step_with_nan_leaves_the_weights_alone_and_training_goes_on(tmp_path) -> None:
    model = Chain()
    model.bad_steps = {2}
    monitor = HealthMonitor([NonFinite()])
    with pytest.warns(FastpostWarning, match="step 2, NaN or infinity: gradients are not finite"):
        trainer(tmp_path, model, monitor).train()
    assert [(f.step, f.action) for f in monitor.findings] == [(2, "warn")]
    for parameter in model.parameters():
        assert bool(parameter.isfinite().all())
    stock = Chain()
    stock.bad_steps = {2}
    trainer(tmp_path, stock, HealthMonitor([])).train()
    assert bool(stock.second.weight.isnan().all())  # what happens without


def test_nan_made_in_backward_is_next_to_the_last_bad_tensor(tmp_path) -> None:
    model = Chain()
    model.bad_steps, model.breaks_forward = {1}, False
    monitor = HealthMonitor([NonFinite()], trace_activations=True)
    with pytest.warns(FastpostWarning):
        trainer(tmp_path, model, monitor, max_steps=1).train()
    (finding,) = monitor.findings
    assert "2 of 3 tensors, first 'first.weight', last 'second.weight'" in finding.figures
    assert "every module's output is finite, the loss or backward made it" in finding.figures


def test_accumulated_gradients_are_one_step(tmp_path) -> None:
    model = Chain()
    model.bad_steps = {3}  # the first of the two backward passes of step 2
    monitor = HealthMonitor([NonFinite()])
    with pytest.warns(FastpostWarning):
        trainer(tmp_path, model, monitor, gradient_accumulation_steps=2).train()
    assert [finding.step for finding in monitor.findings] == [2]


def break_weight(model: Chain) -> None:
    with torch.no_grad():
        model.second.weight[1, 2] = math.nan


def break_output(model: Chain) -> None:
    model.second.register_forward_hook(lambda module, args, output: output * math.inf)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("break_it", [break_weight, break_output])
def test_the_layer_that_makes_nan_is_named_and_the_run_stops(break_it, traced, tmp_path) -> None:
    model = Chain()
    break_it(model)
    monitor = HealthMonitor([NonFinite(max_bad_steps=2)], trace_activations=traced)
    running = trainer(tmp_path, model, monitor)
    with pytest.warns(FastpostWarning) as warned:
        running.train()
    assert [str(w.message).endswith("Training stops") for w in warned] == [False, True]
    assert running.state.global_step == 2
    first, second = monitor.findings
    assert "3 of 3 tensors, first 'first.weight'; " in second.figures
    assert "module 'second' made it from finite inputs" in second.figures
    assert ("module 'second'" in first.figures) is traced
    named = "the weights of 'second.weight' are not finite"
    assert (named in first.figures) is (break_it is break_weight)
    assert not model.first._forward_hooks and not model.first.weight._post_accumulate_grad_hooks


def test_a_healthy_run_says_nothing(tmp_path) -> None:
    model = Chain()
    del model.unused
    monitor = HealthMonitor(trace_activations=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastpostWarning)
        trainer(tmp_path, model, monitor).train()
    assert not monitor.findings and len(monitor.readings) >= 6


def test_watching_does_not_change_the_run(tmp_path) -> None:
    runs = []
    for monitor in (HealthMonitor([]), HealthMonitor(trace_activations=True)):
        model = Chain()
        del model.unused
        trainer(tmp_path, model, monitor).train()
        runs.append(model)
    for ours, stock in zip(*(run.parameters() for run in runs), strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=0)


def test_an_attention_mask_of_minus_infinity_is_no_culprit() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (x + mask).softmax(-1) / 0

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Masked()

        def forward(self, x: torch.Tensor) -> dict:
            return {"nested": [self.inner(x, mask=torch.tensor([0.0, -math.inf]))]}

    model = Outer()
    trace = ActivationTrace(model)
    model(torch.zeros(2))
    assert trace.culprit() == "inner"
    trace.forget()
    assert trace.culprit() is None
    trace.remove()
