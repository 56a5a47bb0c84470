"""Bradley-Terry with margin and centring."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpost.losses import bradley_terry_loss


def test_sum_worked_by_hand() -> None:
    """r_w = 2, r_l = −1, m = 1.5: −log σ(3 − 1.5) = 0.201413; c = 0.1 adds 0.1 (2 − 1)² = 0.1.

    Without a margin −log σ(3) = 0.048587.
    """
    rewards = torch.tensor([2.0]), torch.tensor([-1.0])
    found = bradley_terry_loss(*rewards, torch.tensor([1.5]), center_rewards_coefficient=0.1)
    assert found.loss.item() == pytest.approx(0.301413, abs=2e-6)
    assert found.reward_margin.item() == 3.0
    assert bradley_terry_loss(*rewards).loss.item() == pytest.approx(0.048587, abs=2e-6)


@pytest.mark.parametrize("has_margin", [False, True])
@pytest.mark.parametrize("coefficient", [None, 0.2])
@pytest.mark.parametrize("num_pairs", [1, 3])
def test_equals_trl(
    has_margin: bool, coefficient: float | None, num_pairs: int, trl_reward: Callable[..., Tensor]
) -> None:
    rewards = torch.randn(2 * num_pairs, requires_grad=True)
    margin = torch.rand(num_pairs) if has_margin else None
    theirs = trl_reward(rewards, margin, coefficient)
    found = bradley_terry_loss(
        *rewards.chunk(2), margin, center_rewards_coefficient=coefficient or 0.0
    ).loss.mean()
    torch.testing.assert_close(found, theirs)
    torch.testing.assert_close(*[torch.autograd.grad(loss, rewards)[0] for loss in (found, theirs)])


def test_gradient() -> None:
    inputs = tuple(torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    margin = torch.rand(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w, r: bradley_terry_loss(w, r, margin, center_rewards_coefficient=0.3).loss, inputs
    )


def test_far_rewards_stay_finite() -> None:
    rewards = torch.tensor([-1e4], requires_grad=True)
    bradley_terry_loss(rewards, torch.tensor([1e4])).loss.sum().backward()
    assert rewards.grad.item() == -1.0


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match=r"center_rewards_coefficient=-0.1 was given, expected"):
        bradley_terry_loss(torch.zeros(1), torch.zeros(1), center_rewards_coefficient=-0.1)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards_rejected \[2, 1\]"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"margin \[2, 1\]"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2, 1))
