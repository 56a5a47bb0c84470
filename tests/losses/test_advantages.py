"""Advantages from groups of rewards, and whitening."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpost.losses import (
    centred_advantages,
    group_advantages,
    leave_one_out_advantages,
    whiten,
)

EVERY = [centred_advantages, group_advantages, leave_one_out_advantages]
NAN = float("nan")


def test_worked_by_hand() -> None:
    """Groups 1, 2, 3 and 5, 5, 5.

    Centred −1, 0, 1; std 1, so over 1.0001; leave one out 1 − 2.5, 2 − 2, 3 − 1.5.
    """
    rewards = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    assert centred_advantages(rewards, 3).tolist() == [-1, 0, 1, 0, 0, 0]
    assert leave_one_out_advantages(rewards, 3).tolist() == [-1.5, 0, 1.5, 0, 0, 0]
    expected = torch.tensor([-1.0, 0, 1, 0, 0, 0]) / 1.0001
    torch.testing.assert_close(group_advantages(rewards, 3), expected)


def test_whitening_worked_by_hand() -> None:
    """1, 3 scored: mean 2, variance 2, so ∓1/√2 = ∓0.707107."""
    found = whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, torch.tensor([[-0.707107, 0.707107, 0.0]]))


def trl_group(rewards: Tensor, num_generations: int) -> Tensor:
    """GRPOTrainer with scale_rewards="group"."""
    from trl.trainer.utils import nanstd

    groups = rewards.view(-1, num_generations)
    mean = groups.nanmean(dim=1).repeat_interleave(num_generations)
    std = nanstd(groups, dim=1).repeat_interleave(num_generations)
    return ((rewards - mean) / (std + 1e-4)).nan_to_num(nan=0.0)


def trl_leave_one_out(rewards: Tensor, num_generations: int) -> Tensor:
    """RLOOTrainer without normalisation."""
    groups = rewards.view(-1, num_generations)
    counts = (~groups.isnan()).sum(dim=1, keepdim=True)
    baselines = (groups.nansum(dim=1, keepdim=True) - groups) / (counts - 1)
    return (groups - baselines).flatten().nan_to_num(nan=0.0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(group_advantages, trl_group), (leave_one_out_advantages, trl_leave_one_out)],
)
@pytest.mark.parametrize("unscorable", [[], [0], [1, 2, 3], [0, 1, 2, 3]])
def test_equals_trl(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], unscorable: list[int]
) -> None:
    rewards = torch.randn(12)
    rewards[unscorable] = NAN
    torch.testing.assert_close(ours(rewards, 4), theirs(rewards, 4))


@pytest.mark.parametrize("advantages", EVERY)
def test_a_group_of_one_gives_zero(advantages: Callable[..., Tensor]) -> None:
    assert advantages(torch.tensor([3.0, NAN]), 1).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("advantages", EVERY)
def test_groups_sum_to_zero(advantages: Callable[..., Tensor]) -> None:
    found = advantages(torch.randn(15, dtype=torch.float64), 5).view(3, 5).sum(dim=1)
    torch.testing.assert_close(found, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("advantages", EVERY)
@pytest.mark.parametrize(("rewards", "size"), [((5,), 2), ((4, 1), 2), ((4,), 0)])
def test_broken_groups_are_refused(
    advantages: Callable[..., Tensor], rewards: tuple[int, ...], size: int
) -> None:
    with pytest.raises(ValueError, match=r"num_generations=., expected \[prompts"):
        advantages(torch.zeros(rewards), size)


def test_whitened_tokens_have_mean_zero_and_variance_one() -> None:
    mask = torch.rand(4, 9) < 0.6
    found = whiten((torch.randn(4, 9) * 3 + 5).masked_fill(~mask, NAN), mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[mask].var().item() == pytest.approx(1, abs=1e-5)
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("num_scored", [0, 1])
def test_whitening_hardly_anything_gives_zero(num_scored: int) -> None:
    mask = torch.arange(3).unsqueeze(0) < num_scored
    assert whiten(torch.full((1, 3), 7.0), mask).tolist() == [[0.0, 0.0, 0.0]]
