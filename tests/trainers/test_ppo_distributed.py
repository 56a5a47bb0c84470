"""Two processes with half the rows each take the PPO steps of one process with all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import run_processes
from tests.trainers.ppo_distributed_child import CASES, run_case

# Standard deviations over the rows of a process; rates of a process.
PER_PROCESS = {"reward_std", "explained_variance"}
# Means over a process's tokens, averaged: equal only where processes have as many tokens.
PER_TOKEN = {"entropy", "approx_kl", "ratio", "kl", "loss/policy", "loss/value"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    run_processes("tests.trainers.ppo_distributed_child", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, folder) -> None:
    first, second = (torch.load(folder / f"{case}-rank{rank}.pt") for rank in range(2))
    alone = run_case(case, folder, 1)
    assert len(alone["logs"]) == 4
    assert all(line["grad_norm"] > 0 for line in alone["logs"])
    assert alone["weights"].keys() == first["weights"].keys()
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-5, rtol=0)
    assert first["kl_coef"] == pytest.approx(alone["kl_coef"], rel=1e-5)
    for ours, expected in zip(first["logs"], alone["logs"], strict=True):
        assert ours.keys() == expected.keys()
        for name in ours.keys() - PER_PROCESS - PER_TOKEN:
            if not name.startswith("clip_ratio"):
                assert ours[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
