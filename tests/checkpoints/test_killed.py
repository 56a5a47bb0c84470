"""A run that is killed at any moment goes on from its newest checkpoint as if it had not been.

Moments are drawn from a seed: every other one is before some file is opened, renamed or removed in
the run's folder, by its number; the rest are after some share of a run's time. Wherever they fall,
each checkpoint that has its name is, bit for bit, that of the run left alone.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from fastpost.checkpoints import last_complete_checkpoint
from tests.checkpoints.comparison import all_differences
from tests.checkpoints.forked import KILLED, Server

STEPS = 4
RUN = {"max_steps": STEPS, "save_steps": 1}


def left_alone(server: Server, folder: Path, processes: int, **options: Any) -> tuple[int, float]:
    """Run to the end with every checkpoint kept; how many file events and seconds that took."""
    counted = folder.with_suffix(".txt")
    began = time.monotonic()
    done = server.run(
        "train_until_killed", processes, folder=folder, count_into=counted, **RUN, **options
    )
    assert done == [0] * processes, server.errors()
    return int(counted.read_text()), time.monotonic() - began


def kill_often(
    server: Server, runs: Path, kills: int, seed: int, processes: int = 1, **options: Any
) -> None:
    """Kill runs so often; a run that gets to its end is followed by a new one."""
    name = f"{'sharded' if options['is_sharded'] else 'plain'}-{processes}-{kills}-{seed}"
    whole = runs / f"{name}-whole"
    events, seconds = left_alone(server, whole, processes, **options)
    draw = random.Random(seed)
    killed = ended = 0
    while True:
        folder = runs / f"{name}-{ended}"
        # Half as far as a run goes: later moments are reached by the runs that are resumed.
        moment = draw.random() / 2
        when: dict[str, Any] = {"kill_after": moment * seconds}
        # A process alone cannot kill the others at its own moment.
        if killed % 2 and processes == 1:
            when = {"kill_at": 1 + int(moment * events)}
        if killed == kills:
            when = {}
        statuses = server.run(
            "train_until_killed",
            processes,
            folder=folder,
            save_total_limit=2,
            **when,
            **RUN,
            **options,
        )
        assert set(statuses) <= ({0, KILLED} if when else {0}), server.errors()
        killed += KILLED in statuses
        newest, unfinished = last_complete_checkpoint(folder)
        assert unfinished == []
        if newest is not None:
            assert all_differences(whole / Path(newest).name, Path(newest)) == []
        if set(statuses) == {0}:
            names = sorted(p.name for p in folder.iterdir())
            assert names == ["README.md", f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
            ended += 1
        if not when:
            return


def test_killed_a_few_times(server: Server, runs: Path) -> None:
    kill_often(server, runs, 3, seed=1, is_sharded=True)


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [True, False], ids=["sharded", "plain"])
def test_killed_at_random_moments(is_sharded: bool, server: Server, runs: Path) -> None:
    kill_often(server, runs, 30 if is_sharded else 20, seed=2, is_sharded=is_sharded)


@pytest.mark.slow
def test_two_processes_killed_at_random_moments(server: Server, runs: Path) -> None:
    kill_often(server, runs, 6, seed=3, processes=2, is_sharded=True)
