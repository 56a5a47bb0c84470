"""ORPO, SimPO and CPO: losses over pairs without a reference."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost.losses import cpo_hinge_loss, cpo_ipo_loss, cpo_loss, log_odds, orpo_loss, simpo_loss

SELF = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")))


def pairs(num_pairs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Mean token log-probs of chosen and rejected answers."""
    chosen, rejected = -torch.rand(2, num_pairs, dtype=dtype) * 2 - 0.01
    return chosen.requires_grad_(), rejected.requires_grad_()


def cpo_stand_in(loss_type: str, **fields: Any) -> SimpleNamespace:
    defaults = {"loss_type": loss_type, "alpha": 0.0, "beta": 0.3, "label_smoothing": 0.0}
    return SimpleNamespace(**(vars(SELF) | defaults | fields))


def assert_equal_to_trl(found: Tensor, theirs: Tensor, chosen: Tensor, rejected: Tensor) -> None:
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(loss.sum(), (chosen, rejected)) for loss in (found, theirs)]
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_orpo_worked_by_hand() -> None:
    """p_w = 0.5 has odds 1, p_l = 0.2 odds 0.25: log odds ratio log 4 = 1.386294, σ = 0.8.

    NLL 1.5, λ = 0.1: 1.5 − 0.1 log 0.8 = 1.5 + 0.1 · 0.223144 = 1.522314.
    """
    found = orpo_loss(torch.tensor([0.5]).log(), torch.tensor([0.2]).log(), torch.tensor(1.5))
    assert found.loss.item() == pytest.approx(1.522314, abs=1e-6)
    assert found.log_odds.item() == pytest.approx(1.386294, abs=1e-6)
    assert found.rewards_chosen.item() == pytest.approx(-0.0693147, abs=1e-6)


def test_simpo_worked_by_hand() -> None:
    """r̄ = −1 and −2, β = 2, γ = 0.5: z = 2 · 1 − 0.5 = 1.5, −log σ(1.5) = 0.201413.

    With ε = 0.1: 0.9 · 0.201413 + 0.1 · 1.701413 = 0.351413.
    """
    tensors = torch.tensor([-1.0]), torch.tensor([-2.0])
    found = simpo_loss(*tensors, beta=2.0, simpo_gamma=0.5)
    assert found.loss.item() == pytest.approx(0.201413, abs=2e-6)
    assert (found.rewards_chosen.item(), found.rewards_rejected.item()) == (-2.0, -4.0)
    found = simpo_loss(*tensors, beta=2.0, simpo_gamma=0.5, label_smoothing=0.1)
    assert found.loss.item() == pytest.approx(0.351413, abs=2e-6)


def test_cpo_worked_by_hand() -> None:
    """log π = −5 and −8, β = 0.5: z = 1.5; NLL 2 with α = 0.5 adds 1.

    CPO 0.201413 + 1. Hinge at β = 0.25: 1 − 0.75 = 0.25, + 1. IPO at β = 0.25: (3 − 2)² + 1.
    """
    given = torch.tensor([-5.0]), torch.tensor([-8.0]), torch.tensor(2.0)
    found = cpo_loss(*given, beta=0.5, cpo_alpha=0.5).loss.item()
    assert found == pytest.approx(1.201413, abs=2e-6)
    assert cpo_hinge_loss(*given, beta=0.25, cpo_alpha=0.5).loss.item() == 1.25
    assert cpo_ipo_loss(*given, beta=0.25, cpo_alpha=0.5).loss.item() == 2.0


@pytest.mark.parametrize("num_pairs", [1, 3])
def test_orpo_equals_trl(num_pairs: int) -> None:
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = pairs(num_pairs)
    nll = torch.tensor(1.7)
    trainer = SimpleNamespace(**vars(SELF), beta=0.3)
    weighted, rewards, _, _, mean_log_odds = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    found = orpo_loss(chosen, rejected, nll, beta=0.3)
    assert_equal_to_trl(found.loss, nll - weighted, chosen, rejected)
    torch.testing.assert_close(found.rewards_chosen, rewards)
    torch.testing.assert_close(found.log_odds.mean(), mean_log_odds.detach())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_equals_trl(label_smoothing: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = pairs(3)
    trainer = cpo_stand_in("simpo", simpo_gamma=0.6, label_smoothing=label_smoothing)
    theirs, rewards, _ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    found = simpo_loss(chosen, rejected, beta=0.3, simpo_gamma=0.6, label_smoothing=label_smoothing)
    assert_equal_to_trl(found.loss, theirs, chosen, rejected)
    torch.testing.assert_close(found.rewards_chosen, rewards)


@pytest.mark.parametrize(
    ("loss_type", "loss", "given"),
    [
        ("sigmoid", cpo_loss, {}),
        ("sigmoid", cpo_loss, {"label_smoothing": 0.2}),
        ("hinge", cpo_hinge_loss, {}),
        ("ipo", cpo_ipo_loss, {}),
    ],
)
def test_cpo_equals_trl(loss_type: str, loss: Callable[..., Any], given: dict[str, float]) -> None:
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = pairs(3)
    theirs, rewards, _ = CPOTrainer.cpo_loss(cpo_stand_in(loss_type, **given), chosen, rejected)
    nll = torch.tensor(1.7)
    found = loss(chosen, rejected, nll, beta=0.3, cpo_alpha=0.5, **given)
    assert_equal_to_trl(found.loss, theirs + 0.5 * nll, chosen, rejected)
    torch.testing.assert_close(found.rewards_chosen, rewards)


WITH_NLL: list[Callable[..., Any]] = [orpo_loss, cpo_loss, cpo_hinge_loss, cpo_ipo_loss]


@pytest.mark.parametrize("loss", WITH_NLL)
def test_a_scalar_likelihood_leaves_the_mean_of_one_per_pair(loss: Callable[..., Any]) -> None:
    chosen, rejected = pairs(3)
    nll = torch.rand(3)
    per_pair = loss(chosen, rejected, nll).loss.mean()
    torch.testing.assert_close(loss(chosen, rejected, nll.mean()).loss.mean(), per_pair)


@pytest.mark.parametrize("loss", WITH_NLL)
def test_gradient(loss: Callable[..., Any]) -> None:
    nll = torch.rand(3, dtype=torch.float64, requires_grad=True)
    inputs = (*pairs(3, torch.float64), nll)
    assert torch.autograd.gradcheck(lambda *given: loss(*given).loss, inputs)


def test_simpo_gradient() -> None:
    inputs = pairs(3, torch.float64)
    assert torch.autograd.gradcheck(lambda *given: simpo_loss(*given).loss, inputs)


@pytest.mark.parametrize("loss", [*WITH_NLL, simpo_loss])
@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, -3.0), (-3.0, 0.0), (-1e4, -1e-9)])
def test_empty_and_certain_answers_are_defined(
    loss: Callable[..., Any], values: tuple[float, float]
) -> None:
    """A mean of 0 is an empty answer, or one of probability 1."""
    chosen, rejected = (torch.tensor([v], requires_grad=True) for v in values)
    nll = [] if loss is simpo_loss else [torch.tensor(0.0)]
    found = loss(chosen, rejected, *nll).loss
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()


@pytest.mark.parametrize("p", [1e-12, 1e-3, 0.5, 0.999, 1 - 1e-6])
def test_log_odds_are_accurate_in_fp32(p: float) -> None:
    logp = torch.tensor(p, dtype=torch.float64).log().float()
    exact = logp.double()
    expected = exact - torch.log(-torch.expm1(exact))
    torch.testing.assert_close(log_odds(logp).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (orpo_loss, {"beta": 0.0}),
        (cpo_loss, {"beta": -1.0}),
        (cpo_loss, {"label_smoothing": 0.7}),
        (cpo_loss, {"cpo_alpha": -1.0}),
        (cpo_hinge_loss, {"beta": 0.0}),
        (cpo_ipo_loss, {"beta": 0.0}),
    ],
)
def test_hyperparameters_out_of_range_are_refused(
    loss: Callable[..., Any], given: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match="was given, expected"):
        loss(torch.zeros(1), torch.zeros(1), torch.zeros(()), **given)


@pytest.mark.parametrize("given", [{"beta": 0.0}, {"simpo_gamma": -0.1}, {"label_smoothing": 0.7}])
def test_simpo_hyperparameters_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="was given, expected"):
        simpo_loss(torch.zeros(1), torch.zeros(1), **given)


@pytest.mark.parametrize("loss", WITH_NLL)
def test_shapes_that_would_broadcast_are_refused(loss: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="expected one common shape"):
        loss(torch.zeros(2), torch.zeros(2, 1), torch.zeros(()))
    with pytest.raises(ValueError, match=r"chosen_nll \[1\]"):
        loss(torch.zeros(2), torch.zeros(2), torch.zeros(1))
