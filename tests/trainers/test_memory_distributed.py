"""What saves memory, in two processes that shard: equal to the usual run, and to one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_processes
from tests.trainers.memory_child import CASES, run_case


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process left, by case."""
    folder = tmp_path_factory.mktemp("shards")
    run_processes("tests.trainers.memory_child", folder)
    return [{case: torch.load(folder / f"{case}-{rank}.pt") for case in CASES} for rank in range(2)]


@pytest.mark.slow
def test_steps_in_the_backward_are_the_usual_ones_of_shards(ranks: Any) -> None:
    """Bit for bit; and a process holds the sharded gradients of one unit at most."""
    for rank in ranks:
        usual, ours = rank["usual"], rank["in backward"]
        assert usual["loss"] == ours["loss"]
        assert len(usual["norms"]) == 3 and usual["norms"] == pytest.approx(ours["norms"], rel=1e-5)
        for name, weight in usual["weights"].items():
            assert torch.equal(weight, ours["weights"][name]), name
        for one, other in zip(usual["states"], ours["states"], strict=True):
            assert all(torch.equal(value, other[key]) for key, value in one.items())
        assert ours["are_shards"]
        assert ours["most"] <= max(ours["layers"].values())
        assert usual["most"] == sum(usual["layers"].values())


@pytest.mark.slow
def test_tiles_and_offloading_leave_shards_the_same(ranks: Any) -> None:
    """Losses of three steps, each after the update of all weights before it."""
    for rank in ranks:
        assert rank["everything"]["loss"] == pytest.approx(rank["usual"]["loss"], rel=1e-4)
    assert ranks[0]["everything"]["most"] <= max(ranks[0]["everything"]["layers"].values())


@pytest.mark.slow
def test_two_processes_learn_as_one(ranks: Any, tmp_path: Path) -> None:
    alone = run_case("usual", tmp_path, 1)
    assert ranks[0]["usual"]["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    small = [s["exp_avg"].dtype for s in ranks[0]["usual"]["states"]]
    assert small == [s["exp_avg"].dtype for s in alone["states"]]
    assert set(small) == {torch.float32, torch.uint8}
