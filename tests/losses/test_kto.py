"""KTO on labelled answers, and APO-zero unpaired."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost.losses import apo_zero_unpaired_loss, kto_loss, kto_reference_point, seq_sum

GIVEN = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}


def batch(num_rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    logps = -torch.rand(num_rows, 6, dtype=dtype)
    mask = torch.arange(6) < torch.randint(1, 7, (num_rows, 1))
    ref = (logps * mask).sum(dim=1) + torch.randn(num_rows, dtype=dtype)
    return logps.requires_grad_(), ref, mask


def test_sum_worked_by_hand() -> None:
    """r = 3 good and r = −1 bad, z₀ = 1, β = 0.5, λ_D = 1, λ_U = 2.

    Good: 1 − σ(0.5 (3 − 1)) = 1 − σ(1) = 0.268941. Bad: 2 (1 − σ(0.5 (1 + 1))) = 0.537883.
    """
    found = kto_loss(
        torch.tensor([-2.0, -6.0]),
        torch.tensor([-5.0, -5.0]),
        torch.tensor([True, False]),
        torch.tensor(1.0),
        beta=0.5,
        undesirable_weight=2.0,
    )
    torch.testing.assert_close(found.loss, torch.tensor([0.268941, 0.537883]), rtol=0, atol=1e-6)
    assert found.rewards.tolist() == [1.5, -0.5]


def test_apo_zero_unpaired_worked_by_hand() -> None:
    """r = 2 good and r = −1 bad at β = 0.5: 1 − σ(1) = 0.268941 and σ(−0.5) = 0.377541."""
    found = apo_zero_unpaired_loss(
        torch.tensor([2.0, -1.0]), torch.zeros(2), torch.tensor([True, False]), beta=0.5
    )
    torch.testing.assert_close(found.loss, torch.tensor([0.268941, 0.377541]), rtol=0, atol=1e-6)


def test_reference_point_worked_by_hand() -> None:
    """Log-ratios 3 and −1 have mean 1; −3 and 1 have mean −1, cut at 0; none at all give 0."""
    zeros = torch.zeros(2)
    assert kto_reference_point(torch.tensor([3.0, -1.0]), zeros) == 1
    assert kto_reference_point(torch.tensor([-3.0, 1.0]), zeros) == 0
    assert kto_reference_point(zeros[:0], zeros[:0]) == 0
    assert not kto_reference_point(torch.ones(2, requires_grad=True), zeros).requires_grad


@pytest.mark.parametrize("shift", [-2.0, 2.0])
@pytest.mark.parametrize("labels", [[True], [False], [True, False, True], [False, False, False]])
def test_equals_trl(labels: list[bool], shift: float, trl_kto: Callable[..., Any]) -> None:
    logps, ref, mask = batch(len(labels))
    is_desirable = torch.tensor(labels)
    ref_mismatched = torch.randn(len(labels)) - 9
    mismatched = ref_mismatched + shift
    theirs = trl_kto("kto", logps, ref, mask, is_desirable, mismatched, ref_mismatched, **GIVEN)
    point = kto_reference_point(mismatched, ref_mismatched)
    assert point.item() == pytest.approx(theirs.metrics["kl"][0])
    found = kto_loss(seq_sum(logps, mask), ref, is_desirable, point, **GIVEN)
    torch.testing.assert_close(found.loss.mean(), theirs.loss)
    grads = [torch.autograd.grad(loss, logps)[0] for loss in (found.loss.mean(), theirs.loss)]
    torch.testing.assert_close(*grads)
    if True in labels:
        chosen = found.rewards[is_desirable].mean().item()
        assert chosen == pytest.approx(theirs.metrics["rewards/chosen"][0], rel=1e-5)


def test_apo_zero_unpaired_equals_trl(trl_kto: Callable[..., Any]) -> None:
    logps, ref, mask = batch(5)
    is_desirable = torch.tensor([True, False, True, False, False])
    theirs = trl_kto("apo_zero_unpaired", logps, ref, mask, is_desirable, ref, ref, **GIVEN)
    found = apo_zero_unpaired_loss(seq_sum(logps, mask), ref, is_desirable, **GIVEN)
    torch.testing.assert_close(found.loss.mean(), theirs.loss)


def test_gradient() -> None:
    logps, ref, mask = batch(3, torch.float64)
    labels = torch.tensor([True, False, True])
    point = torch.tensor(0.4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: kto_loss(seq_sum(x, mask), ref, labels, point, **GIVEN).loss, (logps,)
    )


def test_empty_and_far_answers_are_defined() -> None:
    policy = torch.tensor([0.0, 1e4, -1e4], requires_grad=True)
    found = kto_loss(policy, torch.zeros(3), torch.tensor([True, False, True]), torch.tensor(0.0))
    found.loss.sum().backward()
    assert torch.isfinite(found.loss).all() and torch.isfinite(policy.grad).all()


def test_the_reference_point_receives_no_gradient() -> None:
    point = torch.tensor(1.0, requires_grad=True)
    policy = torch.zeros(2, requires_grad=True)
    kto_loss(policy, torch.zeros(2), torch.tensor([True, False]), point).loss.sum().backward()
    assert point.grad is None and policy.grad is not None


@pytest.mark.parametrize("name", list(GIVEN))
def test_hyperparameters_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1.0 was given, expected a number > 0"):
        kto_loss(
            torch.zeros(1), torch.zeros(1), torch.tensor([True]), torch.zeros(()), **{name: -1.0}
        )


def test_labels_of_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"is_desirable has dtype torch.int64, expected torch.bool"):
        kto_loss(torch.zeros(1), torch.zeros(1), torch.tensor([1]), torch.zeros(()))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ref_seq_logps \[2, 1\]"):
        kto_loss(torch.zeros(2), torch.zeros(2, 1), torch.tensor([True, False]), torch.zeros(()))
