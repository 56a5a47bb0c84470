from __future__ import annotations

import pytest

from fastpost.ppo.prompt_order import PromptOrder


def order(forwards_done: int, seed: int = 3) -> list[int]:
    return list(PromptOrder(10, 4, 3, seed, lambda: forwards_done))


def test_each_rollout_comes_as_often_as_it_is_learnt_from() -> None:
    indices = order(0)
    assert len(indices) == len(PromptOrder(10, 4, 3, 3, lambda: 0)) == 24
    first, second = indices[:12], indices[12:]
    assert first[:4] == first[4:8] == first[8:] and second[:4] == second[4:8] == second[8:]
    assert len({*first, *second}) == 8


def test_every_epoch_has_an_order_of_its_own() -> None:
    epochs = [order(6 * epoch) for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # inside an epoch (a resumed run) it is that epoch's
    assert order(11) == epochs[1] and order(6, seed=4) != epochs[1]


def test_too_few_prompts() -> None:
    with pytest.raises(ValueError, match="3 prompts, one rollout takes 4"):
        PromptOrder(3, 4, 1, 0, lambda: 0)
