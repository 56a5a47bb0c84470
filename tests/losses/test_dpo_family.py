"""Losses over pairs with a reference: sums by hand, TRL's own method, gradients, edges.

The pair of the hand-worked sums: u_w = 2 and u_l = −1, so with β = 0.5 the margin is z = 1.5 and
the rewards are r_w = 1 and r_l = −0.5. Logistic values used:

    log σ(1.5) = −0.201413   log σ(−1.5) = −1.701413   σ(1.5) = 0.817574   σ(−1.5) = 0.182426
    log σ(1)   = −0.313262   log σ(−1)   = −1.313262   σ(1)   = 0.731059
    log σ(0.5) = −0.474077   σ(−0.5) = 0.377541
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost.losses import (
    PreferenceLoss,
    alpha_divergence_score,
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    discopop_loss,
    dpo_loss,
    dpo_norm_loss,
    exo_pair_loss,
    forward_kl_score,
    hinge_loss,
    ipo_loss,
    js_divergence_score,
    nca_pair_loss,
    robust_dpo_loss,
    seq_sum,
    sppo_hard_loss,
)

PairLoss = Callable[..., PreferenceLoss]

# TRL's name, our function, hyperparameters.
FAMILY: list[tuple[str, PairLoss, dict[str, float]]] = [
    ("sigmoid", dpo_loss, {"beta": 0.3}),
    ("hinge", hinge_loss, {"beta": 0.3}),
    ("ipo", ipo_loss, {"beta": 0.3}),
    ("exo_pair", exo_pair_loss, {"beta": 0.3, "label_smoothing": 0.01}),
    ("nca_pair", nca_pair_loss, {"beta": 0.3}),
    ("robust", robust_dpo_loss, {"beta": 0.3, "label_smoothing": 0.2}),
    ("bco_pair", bco_pair_loss, {"beta": 0.3}),
    ("sppo_hard", sppo_hard_loss, {"beta": 0.3}),
    ("aot", aot_loss, {"beta": 0.3, "label_smoothing": 0.1}),
    ("aot_unpaired", aot_unpaired_loss, {"beta": 0.3, "label_smoothing": 0.1}),
    ("apo_zero", apo_zero_loss, {"beta": 0.3}),
    ("apo_down", apo_down_loss, {"beta": 0.3}),
    ("discopop", discopop_loss, {"beta": 0.3, "discopop_tau": 0.5}),
    ("sigmoid_norm", dpo_norm_loss, {"beta": 3.0}),
]
BY_NAME = {name: (loss, given) for name, loss, given in FAMILY}
NORMALISED = {"ipo", "sigmoid_norm"}
OF_SCORES = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
SCORES = {
    "forward_kl": forward_kl_score,
    "js_divergence": js_divergence_score,
    "alpha_divergence": partial(alpha_divergence_score, f_alpha_divergence_coef=0.3),
}
every_loss = pytest.mark.parametrize("name", list(BY_NAME))


def pair(u_w: float = 2.0, u_l: float = -1.0) -> list[Tensor]:
    """Log-probs of policy and reference, one pair, with the given log-ratios."""
    return [torch.tensor([v]) for v in (-10.0 + u_w, -14.0 + u_l, -10.0, -14.0)]


def lens(name: str, *values: Tensor) -> list[Tensor]:
    return list(values) if name in NORMALISED else []


def batch(num_pairs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs `[2P, 7]`, reference sums `[2P]`, mask; chosen first; lengths 1 to 7."""
    logps = -torch.rand(2 * num_pairs, 7, dtype=dtype) * 2
    seq_lens = torch.randint(1, 8, (2 * num_pairs,))
    mask = torch.arange(7) < seq_lens.unsqueeze(1)
    ref = (logps * mask).sum(dim=1) + torch.randn(2 * num_pairs, dtype=dtype) * 2
    return logps.requires_grad_(), ref, mask


def ours(name: str, logps: Tensor, ref: Tensor, mask: Tensor, **given: Any) -> PreferenceLoss:
    loss, defaults = BY_NAME[name]
    chosen, rejected = seq_sum(logps, mask).chunk(2)
    sizes = lens(name, *mask.sum(dim=1).chunk(2))
    return loss(chosen, rejected, *ref.chunk(2), *sizes, **(defaults | given))


@pytest.mark.parametrize(
    ("loss", "given", "expected"),
    [
        # −log σ(1.5)
        (dpo_loss, {"beta": 0.5}, 0.201413),
        # 0.9 · 0.201413 + 0.1 · 1.701413 = 0.181272 + 0.170141
        (dpo_loss, {"beta": 0.5, "label_smoothing": 0.1}, 0.351413),
        # (0.9 · 0.201413 − 0.1 · 1.701413) / 0.8 = 0.011130 / 0.8
        (robust_dpo_loss, {"beta": 0.5, "label_smoothing": 0.1}, 0.013913),
        # 1 − 0.25 · 3
        (hinge_loss, {"beta": 0.25}, 0.25),
        # 1 − 0.5 · 3 < 0
        (hinge_loss, {"beta": 0.5}, 0.0),
        # 0.817574 (−0.201413 + 0.105361) + 0.182426 (−1.701413 + 2.302585) = −0.078530 + 0.109669
        (exo_pair_loss, {"beta": 0.5, "label_smoothing": 0.1}, 0.031139),
        # 0.313262 + 0.5 · 1.313262 + 0.5 · 0.474077
        (nca_pair_loss, {"beta": 0.5}, 1.206932),
        # 0.313262 + 0.474077
        (bco_pair_loss, {"beta": 0.5}, 0.787339),
        # (2 − 1)² + (−1 + 1)²
        (sppo_hard_loss, {"beta": 0.5}, 1.0),
        # (1 − 0.731059) + 0.377541
        (apo_zero_loss, {"beta": 0.5}, 0.646482),
        # 0.731059 + (1 − 0.817574)
        (apo_down_loss, {"beta": 0.5}, 0.913485),
        # z/τ = 1: 0.268941 · 0.201413 + 0.731059 · e^−1.5 (0.223130) = 0.054168 + 0.163121
        (discopop_loss, {"beta": 0.5, "discopop_tau": 1.5}, 0.217289),
    ],
)
def test_sum_worked_by_hand(loss: PairLoss, given: dict[str, float], expected: float) -> None:
    found = loss(*pair(), **given)
    torch.testing.assert_close(found.loss, torch.tensor([expected]), rtol=0, atol=2e-6)
    assert found.rewards_chosen.tolist() == [given["beta"] * 2]
    assert found.rewards_rejected.tolist() == [-given["beta"]]


def test_length_normalised_sums_worked_by_hand() -> None:
    """u_w = 2 over 4 tokens and u_l = −1 over 1: margin 0.5 + 1 = 1.5.

    IPO at β = 0.5: (1.5 − 1)² = 0.25. DPO at β = 1: −log σ(1.5) = 0.201413.
    """
    sizes = torch.tensor([4]), torch.tensor([1])
    assert ipo_loss(*pair(), *sizes, beta=0.5).loss.item() == pytest.approx(0.25, abs=1e-6)
    found = dpo_norm_loss(*pair(), *sizes, beta=1.0).loss.item()
    assert found == pytest.approx(0.201413, abs=2e-6)


def test_aot_compares_ranks() -> None:
    """Policy margins 3, 1 and reference margins 0, 2: sorted 1, 3 against 0, 2, differences 1, 1.

    At β = 1.5 both give −log σ(1.5) = 0.201413, where DPO sees 3 and −1.
    """
    policy = torch.tensor([-1.0, -1.0]), torch.tensor([-4.0, -2.0])
    ref = torch.tensor([-2.0, -2.0]), torch.tensor([-2.0, -4.0])
    found = aot_loss(*policy, *ref, beta=1.5).loss
    torch.testing.assert_close(found, torch.full((2,), 0.201413), rtol=0, atol=2e-6)


def test_aot_unpaired_compares_ranks_of_log_ratios() -> None:
    """u_w = 2, 0 and u_l = 1, −1: sorted 0, 2 against −1, 1, differences 1, 1; as above."""
    zeros = torch.zeros(2)
    policy = torch.tensor([2.0, 0.0]), torch.tensor([1.0, -1.0])
    found = aot_unpaired_loss(*policy, zeros, zeros, beta=1.5).loss
    torch.testing.assert_close(found, torch.full((2,), 0.201413), rtol=0, atol=2e-6)


@every_loss
@pytest.mark.parametrize("num_pairs", [1, 3, 8])
def test_equals_trl(name: str, num_pairs: int, trl_dpo: Callable[..., Any]) -> None:
    logps, ref, mask = batch(num_pairs)
    given = BY_NAME[name][1]
    theirs = trl_dpo(name, logps, ref, mask, **given)
    found = ours(name, logps, ref, mask)
    torch.testing.assert_close(found.loss.mean(), theirs.loss, rtol=1e-5, atol=1e-6)
    (expected_grad,) = torch.autograd.grad(theirs.loss, logps)
    (grad,) = torch.autograd.grad(found.loss.mean(), logps)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
    rewards = theirs.metrics["rewards/chosen"][0], theirs.metrics["rewards/rejected"][0]
    assert found.rewards_chosen.mean().item() == pytest.approx(rewards[0], rel=1e-5)
    assert found.rewards_rejected.mean().item() == pytest.approx(rewards[1], rel=1e-5)


@pytest.mark.parametrize("name", OF_SCORES)
@pytest.mark.parametrize("divergence", list(SCORES))
def test_equals_trl_under_a_divergence(
    name: str, divergence: str, trl_dpo: Callable[..., Any]
) -> None:
    logps, ref, mask = batch(4)
    given = BY_NAME[name][1] | {
        "f_divergence_type": divergence,
        "f_alpha_divergence_coef": 0.3,
    }
    theirs = trl_dpo(name, logps, ref, mask, **given).loss
    found = ours(name, logps, ref, mask, score=SCORES[divergence]).loss.mean()
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6)
    (expected_grad,) = torch.autograd.grad(theirs, logps)
    (grad,) = torch.autograd.grad(found, logps)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


@every_loss
def test_gradient(name: str) -> None:
    logps, ref, mask = batch(3, torch.float64)
    assert torch.autograd.gradcheck(lambda x: ours(name, x, ref, mask).loss, (logps,))


@every_loss
def test_empty_completions_are_defined(name: str) -> None:
    logps, ref, mask = batch(3)
    mask[0] = mask[4] = False
    found = ours(name, logps, ref, mask)
    found.loss.mean().backward()
    assert torch.isfinite(found.loss).all()
    assert torch.isfinite(logps.grad).all()
    assert (logps.grad[~mask] == 0).all()


@every_loss
@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_far_log_ratios_stay_finite(name: str, size: float) -> None:
    loss, given = BY_NAME[name]
    tensors = pair(u_w=size, u_l=-size)
    tensors[0].requires_grad_()
    found = loss(*tensors, *lens(name, torch.tensor([2]), torch.tensor([3])), **given)
    found.loss.sum().backward()
    assert torch.isfinite(found.loss).all()
    assert torch.isfinite(tensors[0].grad).all()


@every_loss
def test_half_precision_is_widened(name: str) -> None:
    loss, given = BY_NAME[name]
    sizes = lens(name, torch.tensor([4]), torch.tensor([1]))
    half = loss(*(t.bfloat16() for t in pair()), *sizes, **given)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, loss(*pair(), *sizes, **given).loss, rtol=0, atol=0)


@every_loss
def test_reference_receives_no_gradient(name: str) -> None:
    loss, given = BY_NAME[name]
    tensors = [tensor.requires_grad_() for tensor in pair()]
    sizes = lens(name, torch.tensor([4]), torch.tensor([1]))
    loss(*tensors, *sizes, **given).loss.sum().backward()
    assert tensors[0].grad is not None
    assert tensors[2].grad is None and tensors[3].grad is None


@every_loss
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
def test_beta_out_of_range_is_refused(name: str, beta: float) -> None:
    loss = BY_NAME[name][0]
    sizes = lens(name, torch.tensor([4]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"beta=.* was given, expected a number > 0; pass"):
        loss(*pair(), *sizes, beta=beta)


@every_loss
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    tensors = pair()
    tensors[3] = tensors[3].unsqueeze(1)
    sizes = lens(name, torch.tensor([4]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"ref_rejected_seq_logps \[1, 1\], expected one common"):
        BY_NAME[name][0](*tensors, *sizes)


@pytest.mark.parametrize("loss", [ipo_loss, dpo_norm_loss])
def test_lengths_of_another_shape_are_refused(loss: PairLoss) -> None:
    with pytest.raises(ValueError, match=r"rejected_lens \[1, 1\]"):
        loss(*pair(), torch.tensor([4]), torch.tensor([[1]]))


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (dpo_loss, {"label_smoothing": 0.6}),
        (dpo_loss, {"label_smoothing": -0.1}),
        (robust_dpo_loss, {"label_smoothing": 0.5}),
        (exo_pair_loss, {"label_smoothing": 0.0}),
        (aot_loss, {"label_smoothing": 0.6}),
        (aot_unpaired_loss, {"label_smoothing": 0.6}),
        (discopop_loss, {"discopop_tau": 0.0}),
        (
            partial(dpo_loss, score=partial(alpha_divergence_score, f_alpha_divergence_coef=1e999)),
            {},
        ),
    ],
)
def test_hyperparameters_out_of_range_are_refused(loss: PairLoss, given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="was given, expected"):
        loss(*pair(), **given)


def test_divergence_scores_worked_by_hand() -> None:
    """u = log 2, so t = 2.

    forward KL: 1 − 1/2. JS: log(4/3) = 0.287682. alpha ½: (2^−½ − 1)/(−½) = 0.585786.
    alpha 1: log 2 = 0.693147.
    """
    u = torch.tensor([2.0], dtype=torch.float64).log()
    assert forward_kl_score(u).item() == pytest.approx(0.5)
    assert js_divergence_score(u).item() == pytest.approx(0.287682, abs=1e-6)
    assert alpha_divergence_score(u).item() == pytest.approx(0.585786, abs=1e-6)
    limit = alpha_divergence_score(u, f_alpha_divergence_coef=1.0)
    assert limit.item() == pytest.approx(0.693147, abs=1e-6)
