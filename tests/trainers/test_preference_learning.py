"""The example's methods teach a real model: held-out preference accuracy rises."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "preference_learning.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_are_right_against_wrong_and_held_out_ones_are_others() -> None:
    pairs = load_example().reversal_pairs(300, seed=0)
    assert len({pair["prompt"][0]["content"] for pair in pairs}) == len(pairs) == 300
    for pair in pairs:
        words = pair["prompt"][0]["content"].split(": ")[1].split(", ")
        right, wrong = (pair[side][0]["content"].split(", ") for side in ("chosen", "rejected"))
        assert right == words[::-1] != wrong and sorted(right) == sorted(wrong)


def test_answers_to_one_problem_are_no_neighbours_in_a_kto_batch() -> None:
    example = load_example()
    rows = example.labelled_rows(example.reversal_pairs(2 * example.PAIRS_PER_STEP, seed=1))
    size = 2 * example.PAIRS_PER_STEP
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        assert sum(row["label"] for row in batch) == example.PAIRS_PER_STEP
        for row, neighbour in zip(batch, batch[-1:] + batch[:-1], strict=True):
            assert row["prompt"] != neighbour["prompt"]


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize(
    ("method", "steps"), [("kto", 40), ("orpo", 40), ("simpo", 40), ("dpo", 16)]
)
def test_right_answers_come_to_be_preferred(method: str, steps: int) -> None:
    before, after = load_example().main(["--method", method, "--steps", str(steps)])
    assert before < 0.5
    assert after > before + 0.3
