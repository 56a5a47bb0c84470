"""Whole groups are shuffled, whatever a generation batch is made of."""

from __future__ import annotations

import types
from collections import Counter
from typing import Any

import pytest
import torch
from trl.trainer.utils import shuffle_sequence_dict

from fastpost.trainers.group_order import groups_kept_together, shuffle_groups


def a_batch(rows: int) -> dict[str, Any]:
    return {
        "absent": None,
        "rows": torch.arange(rows),
        "matrix": torch.arange(2 * rows).view(rows, 2),
        "count": torch.tensor(7),
        "images": [f"image {i}" for i in range(rows)],
    }


def order_of(rows: int, group: int, start: int = 0) -> list[int]:
    return shuffle_groups(a_batch(rows), group, start)["rows"].tolist()


def test_every_value_moves_with_its_row() -> None:
    torch.manual_seed(0)
    shuffled = shuffle_groups(a_batch(12), 3)
    order = shuffled["rows"].tolist()
    assert order != list(range(12)) and sorted(order) == list(range(12))
    assert shuffled["absent"] is None and shuffled["count"] == 7
    assert shuffled["matrix"].tolist() == [[2 * i, 2 * i + 1] for i in order]
    assert shuffled["images"] == [f"image {i}" for i in order]


@pytest.mark.parametrize(
    ("rows", "group", "start", "parts"),
    [
        (8, 4, 0, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 4, 4, [[0, 1, 2, 3]]),
        (6, 4, 6, [[0, 1], [2, 3, 4, 5]]),  # a group that began on the process before
        (5, 3, 1, [[0, 1], [2, 3, 4]]),
    ],
    ids=["whole", "one", "second-process", "odd"],
)
def test_groups_stay_whole_and_in_order(rows, group, start, parts) -> None:
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        order = order_of(rows, group, start)
        firsts = [part for part in parts if order[0] == part[0]]
        assert firsts
        expected = sorted(parts, key=lambda part: order.index(part[0]))
        assert order == [row for part in expected for row in part]
        seen.add(tuple(order))
    assert len(seen) == (1 if len(parts) == 1 else 2)


def test_every_order_of_groups_is_as_likely() -> None:
    torch.manual_seed(0)
    counts = Counter(tuple(order_of(6, 2)[::2]) for _ in range(3000))
    assert len(counts) == 6
    assert all(400 < count < 600 for count in counts.values())


def test_the_random_numbers_drawn_are_those_of_trl() -> None:
    after = []
    for shuffle in (lambda batch: shuffle_groups(batch, 4), shuffle_sequence_dict):
        torch.manual_seed(5)
        shuffle({"rows": torch.arange(8)})
        after.append(torch.rand(1).item())
    assert after[0] == after[1]


@pytest.mark.parametrize(("micro_batch", "unit"), [(4, 4), (8, 4), (6, 4), (2, 2), (1, 1), (3, 4)])
def test_micro_batches_that_divide_a_group_are_moved_by_themselves(micro_batch, unit) -> None:
    def stock(batch: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("not to be called")

    module = types.ModuleType("trainer")
    module.shuffle_sequence_dict = stock  # type: ignore[attr-defined]
    with groups_kept_together(module, 4, micro_batch, 0):
        torch.manual_seed(1)
        found = module.shuffle_sequence_dict(a_batch(24))["rows"].tolist()
    assert module.shuffle_sequence_dict is stock
    torch.manual_seed(1)
    assert found == order_of(24, unit)


def test_the_name_is_put_back_after_an_error() -> None:
    module = types.ModuleType("trainer")
    module.shuffle_sequence_dict = shuffle_sequence_dict  # type: ignore[attr-defined]
    with pytest.raises(KeyError), groups_kept_together(module, 4, 4, 0):
        raise KeyError
    assert module.shuffle_sequence_dict is shuffle_sequence_dict
