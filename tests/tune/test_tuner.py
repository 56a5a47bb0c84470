"""The tuner from measurement to dispatch, in the interpreter, with a clock that the test sets.

The clock looks at what really ran: a run in which the fused fold was launched is as fast as the
test says, every other one takes a second.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost.tune import stopwatch as stopwatch_module
from fastpost.tune.stopwatch import ROUNDS, WARM_UP, CudaStopwatch
from fastpost.tune.subjects import Sizes, Subject, subjects
from fastpost.tune.tuner import GpuLost, Outcome, Trial, chosen_table, tune
from fastpost_kernels import _choices, linear_logprob
from fastpost_kernels import _fused_fold_triton as fused
from fastpost_kernels._choices import CHOICES, choose, forget, save

CPU, BF16 = torch.device("cpu"), torch.bfloat16
DEVICE = "NVIDIA Test 9000"
TINY = Sizes(
    fold_rows=(5,),
    tile_rows=9,
    widths=(16,),
    vocabs=(70,),
    layer_rows=(5,),
    layers=((18, 16),),
    ranks=(4,),
    few_rows=(5, 20),
    head_sizes=(16,),
    heads=(2, 1),
    prompt=10,
    answers=2,
    answer=4,
)


@pytest.fixture(autouse=True)
def as_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU counts as a GPU of that name; the cache is empty; blocks are small."""
    monkeypatch.setenv("FASTPOST_CACHE", str(tmp_path))
    monkeypatch.setattr(_choices, "device_name", lambda _: DEVICE)
    monkeypatch.setattr(fused, "choose_blocks", lambda *_: fused.Blocks(16, 16, 16, 4, 2))
    forget()
    yield
    forget()


class Clock:
    """Seconds by whether a fused fold ran; `change` alters what it computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fused_seconds = 0.5
        self.folds = 0
        self.change: Callable[[Tensor], object] = lambda state: None
        original = fused.fold_products

        def counted(*args: Any, **flags: Any) -> None:
            self.folds += 1
            original(*args, **flags)
            self.change(args[2])

        monkeypatch.setattr(fused, "fold_products", counted)

    def medians(self, runs: Sequence[Callable[[], object]]) -> list[float]:
        found = []
        for run in runs:
            before = self.folds
            run()
            found.append(1.0 if self.folds == before else self.fused_seconds)
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def fold_subject() -> Subject:
    return next(s for s in subjects(TINY, dtype=BF16) if s.choice == "head_fold")


def tuned(clock: Clock, *given: Subject) -> list[Outcome]:
    return list(tune(given or [fold_subject()], CPU, clock))


def test_from_measurement_to_dispatch(clock: Clock) -> None:
    """Measured, stored, loaded: the next call at this shape takes the faster kernel, no other."""
    tensors = fold_subject().make(CPU)
    plain = linear_logprob(**tensors, backend="triton").logprob
    assert clock.folds == 0
    (outcome,) = outcomes = tuned(clock)
    assert outcome.fault is None and outcome.chosen == "fused"
    assert outcome.trials == (Trial("fused", 0.5, 1.0),) and outcome.trials[0].gain == 0.5
    save(DEVICE, chosen_table(outcomes), [])
    clock.folds = 0
    assert choose("head_fold", CPU, outcome.shape) == "fused"
    found = linear_logprob(**tensors, backend="triton").logprob
    assert clock.folds == 1
    torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-2)
    more = {"hidden": torch.randn(50, 16).to(BF16), "targets": torch.zeros(50, dtype=torch.int64)}
    linear_logprob(**(tensors | more), backend="triton")
    assert clock.folds == 1


@pytest.mark.parametrize(
    ("seconds", "chosen"), [(0.5, "fused"), (0.96, "fused"), (0.98, "tiles"), (1.5, "tiles")]
)
def test_a_winner_needs_three_percent(clock: Clock, seconds: float, chosen: str) -> None:
    clock.fused_seconds = seconds
    (outcome,) = tuned(clock)
    assert outcome.chosen == chosen
    assert outcome.trials[0].gain == pytest.approx(1 - seconds)
    expected = {} if chosen == "tiles" else {"head_fold": {outcome.shape: "fused"}}
    assert chosen_table([outcome]) == expected


def out_of_memory(_: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore lines")


def write_outside(state: Tensor) -> None:
    state.data.as_strided((1,), (1,), state.numel()).zero_()


BROKEN: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "wrong": (lambda state: state[1].mul_(1.2), "logprob is wrong: error"),
    "nan": (lambda state: state[1, -1:].fill_(torch.nan), "logprob holds NaN"),
    "unwritten": (lambda state: state.copy_(torch.empty_like(state)), "holds NaN"),
    "outside": (write_outside, "wrote outside a buffer"),
    "memory": (out_of_memory, "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"),
    "raises": (lambda state: 1 / 0, "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_option_never_wins(case: str, clock: Clock) -> None:
    """However fast it is; it is named, and it is not timed."""
    clock.change, reason = BROKEN[case]
    clock.fused_seconds = 1e-9
    (outcome,) = tuned(clock)
    assert outcome.chosen == "tiles" and chosen_table([outcome]) == {}
    (trial,) = outcome.trials
    assert trial.gain is None and trial.seconds is None
    assert trial.fault is not None and reason in trial.fault and "\n" not in trial.fault
    assert clock.folds == 1


def test_an_option_that_breaks_while_it_is_timed(clock: Clock) -> None:
    def later(_: Tensor) -> None:
        if clock.folds > 1:
            raise RuntimeError("too many launches")

    clock.change = later
    (outcome,) = tuned(clock)
    assert (
        outcome.chosen == "tiles" and outcome.trials[0].fault == "RuntimeError: too many launches"
    )


def test_a_default_that_cannot_run_is_reported_and_the_next_subject_runs(clock: Clock) -> None:
    good = fold_subject()
    too_large = replace(good, make=lambda device: out_of_memory(torch.empty(0)))
    wrong = replace(good, run=lambda given: {n: x + 1 for n, x in good.run(given).items()})
    found = tuned(clock, too_large, wrong, good)
    assert [outcome.chosen for outcome in found] == ["tiles", "tiles", "fused"]
    assert "out of memory" in str(found[0].fault) and found[0].trials == ()
    assert "is wrong" in str(found[1].fault) and found[2].fault is None


def test_the_best_of_several_options_wins() -> None:
    trials = (
        Trial("2048x4096", 0.9, 1.0),
        Trial("8192x4096", fault="RuntimeError: no"),
        Trial("4096x2048", 0.7, 1.0),
        Trial("8192x2048", 0.8, 1.0),
    )
    outcome = Outcome("head_tile", "H1-V1-float32", "M 1", "4096x4096", trials)
    assert outcome.chosen == "4096x2048"
    assert chosen_table([outcome]) == {"head_tile": {"H1-V1-float32": "4096x2048"}}
    assert Outcome("head_tile", "H1-V1-float32", "M 1", "4096x4096").chosen == "4096x4096"


def test_a_lost_gpu_ends_the_tuning(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal access leaves every later call failing: not the next option's fault."""

    def lost(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken = replace(fold_subject(), make=lost)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(GpuLost, match="illegal memory access"):
        list(tune([broken], torch.device("cuda", 0), clock))


def test_every_choice_is_measured_at_its_own_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every default agrees with its truth, and the choice under test is the one that is asked."""
    for name in CHOICES:  # two options are enough, and small tiles are faster to interpret
        if name.startswith("prefix_"):
            monkeypatch.setitem(CHOICES, name, ("default", "16x16x4x1"))
    monkeypatch.setitem(CHOICES, "nf4_rows", ("64", "16"))
    found = list(subjects(TINY, dtype=BF16))
    assert {subject.choice for subject in found} == set(CHOICES)
    asked: set[tuple[str, str]] = set()
    for name in ("_vocab_tiles", "_vocab_workspace", "_prefix_triton", "lora_linear", "nf4_linear"):
        module = importlib.import_module(f"fastpost_kernels.{name}")
        monkeypatch.setattr(module, "choose", spy(asked))

    class Equal:
        def medians(self, runs: Sequence[Callable[[], object]]) -> list[float]:
            return [1.0 for _ in runs]

    for subject in found:
        asked.clear()
        (outcome,) = tune([subject], CPU, Equal())
        assert outcome.fault is None and [t.fault for t in outcome.trials] == [None] * len(
            CHOICES[subject.choice][1:]
        )
        assert (subject.choice, subject.shape) in asked


def spy(asked: set[tuple[str, str]]) -> Callable[[str, torch.device, str], str]:
    def spied(name: str, device: torch.device, shape: str) -> str:
        asked.add((name, shape))
        return choose(name, device, shape)

    return spied


def test_the_stopwatch_runs_in_turns_and_forgets_the_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, order = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    monkeypatch.setattr(stopwatch_module, "FLUSHED_BYTES", 4)

    def run_for(name: str, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            is_cold = order.count(name) <= WARM_UP
            is_disturbed = order.count(name) == WARM_UP + 2
            now[0] += 1000 if is_cold or is_disturbed else milliseconds

        return run

    found = CudaStopwatch(CPU).medians([run_for("a", 3.0), run_for("b", 2.0)])
    assert found == [pytest.approx(3e-3), pytest.approx(2e-3)]
    assert order == ["a", "b"] * (WARM_UP + ROUNDS) + ["wait"]
