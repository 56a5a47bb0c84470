"""KL estimators: values, bias and gradient against exact sums over a small vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpost.losses import kl_k1, kl_k2, kl_k3

ESTIMATORS = [kl_k1, kl_k2, kl_k3]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, log π and log π_ref over 7 tokens."""
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, dtype=torch.float64).log_softmax(0)
    return logits, logits.log_softmax(0), ref


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # π_ref/π = 2: −log 2; ½ log² 2; 2 − 1 − log 2
    [(kl_k1, -0.693147), (kl_k2, 0.240227), (kl_k3, 0.306853)],
)
def test_worked_by_hand(estimator: Callable[..., Tensor], expected: float) -> None:
    found = estimator(torch.tensor([-1.0]), torch.tensor([-1.0 + math.log(2)]))
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_unbiased(estimator: Callable[..., Tensor]) -> None:
    _, logps, ref = distributions()
    exact = (logps.exp() * (logps - ref)).sum()
    torch.testing.assert_close((logps.exp() * estimator(logps, ref)).sum(), exact)


def test_k2_and_k3_are_never_negative() -> None:
    _, logps, ref = distributions()
    assert (kl_k2(logps, ref) >= 0).all() and (kl_k3(logps, ref) >= 0).all()


def test_expected_gradients_are_those_stated() -> None:
    """Under tokens of π: k1's is 0, k2's that of KL(π‖π_ref), k3's that of KL(π_ref‖π)."""
    logits, logps, ref = distributions()
    weights = logps.detach().exp()
    forward = (logps.exp() * (logps - ref)).sum()
    backward = (ref.exp() * (ref - logps)).sum()
    grads = [
        torch.autograd.grad((weights * estimator(logps, ref)).sum(), logits, retain_graph=True)[0]
        for estimator in ESTIMATORS
    ]
    torch.testing.assert_close(grads[0], torch.zeros_like(grads[0]))
    for found, divergence in ((grads[1], forward), (grads[2], backward)):
        expected = torch.autograd.grad(divergence, logits, retain_graph=True)[0]
        torch.testing.assert_close(found, expected)


def test_k3_keeps_small_differences() -> None:
    """d = 1e-3 in fp32: k3 = d²/2 = 5e-7, where e^d − d − 1 is off by the rounding of 1, 6e-8."""
    found = kl_k3(torch.tensor([0.0]), torch.tensor([1e-3])).double().item()
    assert found == pytest.approx(1e-6 / 2, rel=1e-3)


@every_estimator
def test_gradient(estimator: Callable[..., Tensor]) -> None:
    logps = -torch.rand(5, dtype=torch.float64)
    ref = -torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: estimator(x, ref), (logps.requires_grad_(),))


@every_estimator
def test_reference_receives_no_gradient(estimator: Callable[..., Tensor]) -> None:
    logps, ref = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    estimator(logps, ref).sum().backward()
    assert logps.grad is not None and ref.grad is None


@every_estimator
def test_shapes_that_would_broadcast_are_refused(estimator: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"ref_logps \[2, 1\]"):
        estimator(torch.zeros(2), torch.zeros(2, 1))
