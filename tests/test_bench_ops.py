"""`python -m bench.ops` at tiny shapes: what it checks, what it times, what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ops import __main__ as command
from bench.ops import (
    bench_adamw_8bit,
    bench_layers,
    bench_linear_logprob,
    bench_preference_logratio,
    bench_prefix_attention,
    measuring,
)
from bench.ops.contender import Case, Contender, Results, forward_backward
from bench.ops.pareto import front, plot

CPU = torch.device("cpu")
TINY = bench_prefix_attention.Workload([(5, [3, 8]), (7, [4, 2, 1])])
EVEN = bench_prefix_attention.Workload([(0, [6, 6])])
CASES: dict[str, Callable[[], Case]] = {
    op: lambda op=op: bench_linear_logprob.case(op, bench_linear_logprob.problem(24, 32, 300))
    for op in bench_linear_logprob.OPS
}
CASES |= {
    f"preference, {op}": lambda op=op: bench_preference_logratio.case(
        op, bench_preference_logratio.problem(24, 32, 300, CPU)
    )
    for op in bench_preference_logratio.OPS
}
CASES |= {op: lambda op=op: bench_layers.case(op, 64, rows=40) for op in bench_layers.OPS}
CASES["optimizer"] = lambda: bench_adamw_8bit.case(64, layers=1)
CASES |= {
    "attention, shared": lambda: bench_prefix_attention.case("tiny", workload=TINY),
    "attention, one length": lambda: bench_prefix_attention.case("even", workload=EVEN),
}


class Steps:
    """A clock that counts its readings: the n-th run takes n milliseconds."""

    def __init__(self) -> None:
        self.names: list[float] = []

    def milliseconds(self, run: Callable[[], Any]) -> float:
        run()
        self.names.append(len(self.names) + 1.0)
        return self.names[-1]


@pytest.mark.parametrize("name", CASES)
def test_every_contender_agrees_with_the_truth(name: str) -> None:
    """All run and are timed but those for GPUs; the floor stands beside the others."""
    rows = measuring.measure(CASES[name](), Steps(), 1, CPU)
    for row in rows:
        is_gpu_only = row["implementation"] == "Liger"
        assert row["status"] == ("GPU only" if is_gpu_only else "timed"), row
        assert ("median_ms" in row) is not is_gpu_only
    floor, *rivals = rows
    assert floor["over_floor"] == 1 and "error" not in floor
    assert all(0 < row["error"] < row["error_limit"] for row in rivals if "error" in row)
    assert sum(row["implementation"].startswith("fastpost") for row in rivals) >= 1


def test_an_optimizer_that_does_not_step_is_wrong() -> None:
    case = bench_adamw_8bit.case(64, layers=1)
    idle = case.contenders[1]._replace(
        run=lambda: {
            str(i): p.detach()
            for i, p in enumerate(bench_adamw_8bit.parameters(64, 1, torch.bfloat16, "cpu"))
        }
    )
    found = measuring.measure(case._replace(contenders=(idle,)), Steps(), 1, CPU)
    assert found[0]["status"] == "wrong: weights"


def test_flops_of_the_frozen_and_the_trained_head() -> None:
    """From the registered formulas: two and three products, four if the loss is not known."""
    one = 2 * 24 * 32 * 300 / 1e9
    for op, gemms in (("frozen head", [2, 2]), ("trained head", [3, 3, 4])):
        rows = {r["implementation"]: r for r in measuring.measure(CASES[op](), Steps(), 1, CPU)}
        names = [f"{gemms[0]} bare GEMMs", "fastpost cpp"]
        if op == "trained head":
            names.insert(1, "fastpost cross-entropy cpp")
        for name, count in zip(names, gemms, strict=True):
            assert rows[name]["gflop"] == pytest.approx(count * one, abs=1e-3)


def case_of(wrong: Callable[[Tensor], Tensor]) -> Case:
    x = torch.randn(30, 20).bfloat16().requires_grad_()
    grad = torch.randn(30, 20).bfloat16()

    def right(x: Tensor) -> Tensor:
        return x.sin()

    exact = {"x": x.detach().double().requires_grad_()}
    plain = forward_backward(right, {"x": x}, grad)
    return Case(
        "sine",
        "30 x 20",
        forward_backward(right, exact, grad.double()),
        plain,
        (
            Contender("floor", lambda: {}, is_floor=True),
            Contender("right", plain),
            Contender("wrong", forward_backward(wrong, {"x": x}, grad)),
        ),
    )


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos() * 1.1


def _unwritten(x: Tensor) -> Tensor:
    """Right where it writes; it leaves the last row as it found it."""
    out = torch.cat([x.sin()[:-1], torch.empty_like(x[-1:])])
    return out + 0 * x


@pytest.mark.parametrize(
    ("wrong", "result"),
    [
        (lambda x: x.sin() * 1.1, "output"),
        (_WrongGradient.apply, "d x"),
        (_unwritten, "output"),
        (lambda x: x.sin() + torch.nan, "output"),
    ],
    ids=["value", "gradient", "row not written", "nan"],
)
def test_a_wrong_contender_is_not_timed(wrong: Callable[[Tensor], Tensor], result: str) -> None:
    clock = Steps()
    _, right, refused = measuring.measure(case_of(wrong), clock, 3, CPU)
    assert right["status"] == "timed"
    assert refused["status"] == f"wrong: {result}"
    assert "median_ms" not in refused and "peak_extra_mb" not in refused
    assert len(clock.names) == 2 * 3


def test_a_missing_result_is_an_error() -> None:
    case = case_of(lambda x: x.sin())
    lacking = Contender("lacking", lambda: {"output": torch.zeros(30, 20)})
    with pytest.raises(ValueError, match="lacking returned"):
        measuring.check(lacking, case, case.truth(), case.baseline())


def test_a_peer_that_is_not_installed_gets_a_row() -> None:
    def absent() -> Results:
        raise ModuleNotFoundError("No module named 'peer'", name="peer")

    case = case_of(lambda x: x.sin())
    case = case._replace(contenders=(*case.contenders[:2], Contender("absent", absent)))
    assert measuring.measure(case, Steps(), 1, CPU)[2]["status"] == "not installed: peer"


def test_rounds_go_through_all_contenders_and_the_median_counts() -> None:
    floor, right, _ = measuring.measure(case_of(lambda x: x.sin()), Steps(), 3, CPU)
    # readings 1 2 3, 4 5 6, 7 8 9: the floor has 1, 4, 7
    assert (floor["median_ms"], right["median_ms"]) == (4, 5)
    assert right["over_floor"] == 1.25


def test_events_are_recorded_around_the_run_and_read_after_it_ended() -> None:
    """The GPU's clock, with a stand-in for torch.cuda."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: Event) -> float:
            log.append("read")
            return 2.5

    cuda = SimpleNamespace(Event=Event, synchronize=lambda: log.append("wait"))
    clock = measuring.EventClock(cuda)
    assert clock.milliseconds(lambda: log.append("run")) == 2.5
    assert log == ["wait", "record", "run", "record", "wait", "read"]


def test_a_clock_that_cannot_time_the_device_is_refused() -> None:
    assert measuring.choose_clock(None, CPU)[0] == "wall"
    name, clock = measuring.choose_clock(None, torch.device("cuda"))
    assert name == "events" and isinstance(clock, measuring.EventClock)
    for clock_name, device in (("events", CPU), ("wall", torch.device("cuda"))):
        with pytest.raises(ValueError, match=clock_name):
            measuring.choose_clock(clock_name, device)


def test_peak_counts_what_was_alive_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8)
        held = torch.empty(1 << 21, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8)
        del held

    assert measuring.peak_bytes(run) == 3 << 20


def test_front_keeps_what_nothing_beats_in_both() -> None:
    assert front([(3, 1), (1, 5), (2, 5), (2, 3), (4, 2), (1, 5)]) == [(1, 5), (2, 3), (3, 1)]


def test_the_command_writes_table_json_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    shape = ["--rows", "8", "--vocab", "70", "--widths", "16", "32"]
    options = ["--rounds", "1", "--clock", "cpu", "--threads", "1", "--output", str(tmp_path)]
    try:
        command.main(["head", *shape, *options])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "frozen head, M 8, H 32, V 70" in printed and "GPU only" in printed
    result = json.loads((tmp_path / "ops_head.json").read_text())
    assert result["clock"] == "cpu" and result["threads"] == 1 and "machine" in result
    assert {row["shape"] for row in result["results"]} == {
        f"M 8, H {width}, V 70" for width in (16, 32)
    }
    image = (tmp_path / "ops_head.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and len(image) > 10_000


def test_a_table_without_times_still_gets_its_plot(tmp_path: Path) -> None:
    row = {"op": "a", "shape": "b", "implementation": "c", "status": "GPU only"}
    plot([row], tmp_path / "empty.png", "nothing")
    assert (tmp_path / "empty.png").stat().st_size > 0
