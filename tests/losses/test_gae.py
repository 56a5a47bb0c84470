"""Generalised advantage estimation, and the value loss on its returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpost.losses import gae, value_loss


def test_sum_worked_by_hand() -> None:
    """r = 0, 0, 1; V = 0.5, 0.6, 0.8; γ = 1, λ = 0.5.

    δ = 0.1, 0.2, 0.2; A₂ = 0.2, A₁ = 0.2 + 0.1 = 0.3, A₀ = 0.1 + 0.15 = 0.25; R = A + V.
    """
    found = gae(
        torch.tensor([[0.0, 0.0, 1.0]]),
        torch.tensor([[0.5, 0.6, 0.8]]),
        torch.ones(1, 3, dtype=torch.bool),
        gae_lambda=0.5,
    )
    torch.testing.assert_close(found.advantages, torch.tensor([[0.25, 0.3, 0.2]]))
    torch.testing.assert_close(found.returns, torch.tensor([[0.75, 0.9, 1.0]]))


def by_definition(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k}, summed term by term over one sequence `[T]`."""
    ahead = torch.cat([values[1:], values.new_zeros(1)])
    deltas = rewards + gamma * ahead - values
    return torch.stack(
        [
            sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[t:]))
            for t in range(len(values))
        ]
    )


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0)])
def test_unscored_tokens_are_not_steps(gamma: float, gae_lambda: float) -> None:
    """With gaps: the scored tokens alone, put one behind the other, give the same advantages."""
    mask = torch.tensor(
        [[True, False, False, True, True, False], [False, True, True, True, True, True]]
    )
    rewards = torch.randn(2, 6, dtype=torch.float64).masked_fill(~mask, 0.0)
    values = torch.randn(2, 6, dtype=torch.float64).masked_fill(~mask, float("nan"))
    found = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    for row in range(2):
        steps = mask[row]
        expected = by_definition(rewards[row, steps], values[row, steps], gamma, gae_lambda)
        torch.testing.assert_close(found.advantages[row, steps], expected)
        torch.testing.assert_close(found.returns[row, steps], expected + values[row, steps])
    assert not found.advantages[~mask].any() and not found.returns[~mask].any()


@pytest.mark.parametrize("width", [0, 4])
def test_empty_completions_give_zero(width: int) -> None:
    zeros = torch.zeros(3, width)
    found = gae(zeros, torch.randn(3, width), torch.zeros(3, width, dtype=torch.bool))
    assert torch.equal(found.advantages, zeros) and torch.equal(found.returns, zeros)


def test_no_gradient_passes() -> None:
    values = torch.randn(1, 3, requires_grad=True)
    found = gae(torch.zeros(1, 3), values, torch.ones(1, 3, dtype=torch.bool))
    assert not found.advantages.requires_grad and not found.returns.requires_grad


def test_a_reward_no_token_is_credited_with_is_refused() -> None:
    with pytest.raises(ValueError, match="a reward was given at a token outside response_mask"):
        gae(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[True, False]]))


@pytest.mark.parametrize("given", [{"gamma": 1.1}, {"gae_lambda": -0.1}, {"gamma": float("nan")}])
def test_hyperparameters_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"was given, expected 0\.0 <="):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), **given)


def test_value_loss_worked_by_hand() -> None:
    """Old 0, ε = 0.2. V = 1, R = 1: clipped 0.2, error 0.64 > 0, loss 0.32, clipped.

    V = 1, R = −1: error 4 > 1.44, loss 2, not clipped. V = 0.1, R = 0.3: 0.04, loss 0.02.
    Mean (0.32 + 2 + 0.02)/3 = 0.78.
    """
    values = torch.tensor([[1.0, 1.0, 0.1, 50.0]])
    returns = torch.tensor([[1.0, -1.0, 0.3, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    found = value_loss(values, torch.zeros(1, 4), returns, mask)
    assert found.loss.item() == pytest.approx(0.78)
    assert found.is_clipped.tolist() == [[True, False, False, False]]
    found = value_loss(values, torch.zeros(1, 4), returns, mask, num_items=9)
    assert found.loss.item() == pytest.approx(0.26)


def test_value_loss_gradient() -> None:
    values, old, returns = torch.randn(3, 2, 5, dtype=torch.float64)
    mask = torch.rand(2, 5) < 0.7
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, mask).loss, (values,))


def test_clipped_values_receive_no_gradient() -> None:
    values = torch.tensor([[1.0, 1.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    value_loss(values, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), mask).loss.backward()
    assert values.grad.tolist() == [[0.0, 1.0]]


def test_value_loss_of_nothing_is_zero() -> None:
    nan = torch.full((2, 3), float("nan"))
    found = value_loss(nan, nan, nan, torch.zeros(2, 3, dtype=torch.bool))
    assert found.loss.item() == 0 and not found.is_clipped.any()


def test_value_loss_arguments_out_of_range_are_refused() -> None:
    zeros, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"epsilon=0\.0 was given, expected a number > 0"):
        value_loss(zeros, zeros, zeros, mask, epsilon=0.0)
    with pytest.raises(ValueError, match="expected one common shape"):
        value_loss(zeros, zeros[:, :1], zeros, mask)
