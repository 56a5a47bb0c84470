"""Entropy of a distribution and its mean over scored tokens."""

from __future__ import annotations

import math

import pytest
import torch

from fastpost.losses import mean_entropy, token_entropy


def test_worked_by_hand() -> None:
    """Uniform over 4: log 4 = 1.386294. Probabilities ¾ and ¼: 0.562335. Certain: 0."""
    assert token_entropy(torch.zeros(4)).item() == pytest.approx(math.log(4))
    found = token_entropy(torch.tensor([3.0, 1.0]).log())
    assert found.item() == pytest.approx(0.562335, abs=1e-6)
    assert token_entropy(torch.tensor([0.0, float("-inf")])).item() == 0.0


def test_mean_worked_by_hand() -> None:
    """Entropies 1 and 3 scored: 2, over 8 items 0.5; nothing scored gives 0."""
    entropies, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    assert mean_entropy(entropies, mask).item() == 2.0
    assert mean_entropy(entropies, mask, 8).item() == 0.5
    assert mean_entropy(entropies, mask & False).item() == 0.0


def test_equals_trl() -> None:
    from trl.trainer.utils import entropy_from_logits

    logits = torch.randn(2, 3, 11) * 4
    torch.testing.assert_close(token_entropy(logits), entropy_from_logits(logits))


def test_gradient() -> None:
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(token_entropy, (logits,))


def test_excluded_tokens_have_no_gradient() -> None:
    logits = torch.tensor([0.0, 1.0, float("-inf")], requires_grad=True)
    token_entropy(logits).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[2] == 0


def test_half_precision_is_widened() -> None:
    assert token_entropy(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.float32
