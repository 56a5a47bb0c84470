from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastpost.ppo.experience import (
    NUM_TOKENS,
    MinibatchOrder,
    experience,
    explained_variance,
)

ALONE = SimpleNamespace(num_processes=1, process_index=0, reduce=lambda tensor, how: tensor)


def stored(lengths: list[int]) -> dict[str, torch.Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.arange(len(lengths))[:, None], "response_mask": mask}


def test_every_epoch_sees_every_row_once_and_groups_together() -> None:
    order = MinibatchOrder(12, 3, epochs=2, mini_batches=2, micro_batches=2, seed=1)
    assert order.forwards == 8
    rollout = stored(list(range(1, 13)))
    rollout[NUM_TOKENS] = order.count_tokens(ALONE, 5, rollout["response_mask"])
    batches = [order.micro_batch(rollout, 5 * 8 + forward) for forward in range(8)]
    rows = [batch["input_ids"].flatten().tolist() for batch in batches]
    for epoch in (rows[:4], rows[4:]):
        flat = [row for batch in epoch for row in batch]
        assert sorted(flat) == list(range(12))
        assert all(flat[i] == flat[i - 1] + 1 for i in range(12) if i % 3)
    assert rows[:4] != rows[4:]
    # another rollout, another order; the same step, the same rows
    assert order.row_order(5, 0).tolist() != order.row_order(6, 0).tolist()
    assert order.micro_batch(rollout, 41)["input_ids"].flatten().tolist() == rows[1]


def test_micro_batches_carry_the_tokens_of_their_minibatch() -> None:
    order = MinibatchOrder(8, 1, epochs=1, mini_batches=2, micro_batches=2, seed=1)
    rollout = stored([1, 2, 3, 4, 5, 6, 7, 8])
    rollout[NUM_TOKENS] = order.count_tokens(ALONE, 0, rollout["response_mask"])
    batches = [order.micro_batch(rollout, forward) for forward in range(4)]
    tokens = [int(batch["response_mask"].sum()) for batch in batches]
    assert [int(batch["num_items"]) for batch in batches] == [
        tokens[0] + tokens[1],
        tokens[0] + tokens[1],
        tokens[2] + tokens[3],
        tokens[2] + tokens[3],
    ]
    assert sum(tokens) == 36 and NUM_TOKENS not in batches[0]


def test_scores_alone_become_rewards_to_go() -> None:
    """β = 0, V = 0, γ = λ = 1: every token of a completion has its score as return."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    zeros = torch.zeros(2, 3)
    found = experience(
        ALONE,
        {"response_mask": mask},
        zeros,
        zeros,
        torch.tensor([2.0, -1.0]),
        zeros,
        kl_coef=0.0,
        gamma=1.0,
        lam=1.0,
        whiten_rewards=False,
    )
    assert found["returns"].tolist() == [[2.0, 2.0, 2.0], [-1.0, 0.0, 0.0]]
    advantages = found["advantages"][mask]
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages.var()) == pytest.approx(1, abs=1e-6)


def test_explained_variance() -> None:
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 6.0, 99.0]])
    assert float(explained_variance(returns, returns, mask)) == pytest.approx(1)
    assert float(explained_variance(returns, returns + 5, mask)) == pytest.approx(1)
    assert float(explained_variance(returns, torch.full_like(returns, 3.0), mask)) == 0
    assert float(explained_variance(returns, -returns, mask)) == pytest.approx(-3)
    assert float(explained_variance(torch.ones(1, 4), returns, mask)) == 0
