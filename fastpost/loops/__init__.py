"""Alignment loops: what is done around the trainers, each one file that reads from top to bottom.

A loop is a function `(model, tokenizer, data..., folder, *, options) -> LoopResult` whose folder
holds a journal: killed and run again it goes on where it was (`run`, `journal`). `test_time` is a
context manager instead.
"""

from __future__ import annotations

from collections.abc import Callable

from fastpost.loops.constitutional import constitutional
from fastpost.loops.iterated import iterated
from fastpost.loops.length_control import length_control
from fastpost.loops.online_judge import online_judge
from fastpost.loops.r1 import r1
from fastpost.loops.rejection_sampling import rejection_sampling
from fastpost.loops.run import LoopResult
from fastpost.loops.spin import spin

__all__ = ["LOOPS", "LoopResult"]

# What a pipeline calls them by.
LOOPS: dict[str, Callable[..., LoopResult]] = {
    "constitutional": constitutional,
    "iterated": iterated,
    "length_control": length_control,
    "online_judge": online_judge,
    "r1": r1,
    "rejection_sampling": rejection_sampling,
    "spin": spin,
}
