"""PPO, GRPO, Dr. GRPO, DAPO, GSPO and RLOO: sums by hand, TRL's own method, gradients, edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost.losses import (
    PolicyLoss,
    dapo_loss,
    dr_grpo_loss,
    grpo_loss,
    gspo_loss,
    kl_k3,
    kl_penalised_rewards,
    ppo_loss,
    rloo_loss,
    seq_sum,
)

Loss = Callable[..., PolicyLoss]

MAX_LENGTH = 11
NUM_ITEMS = 29
CLIP = {"epsilon_low": 0.1, "epsilon_high": 0.3}
# TRL's loss_type and level, our function, what only it needs.
GRPO_FAMILY: dict[str, tuple[str, str, Loss, dict[str, Any]]] = {
    "grpo": ("grpo", "token", grpo_loss, {}),
    "dr_grpo": ("dr_grpo", "token", dr_grpo_loss, {"max_completion_length": MAX_LENGTH}),
    "dapo": ("dapo", "token", dapo_loss, {"num_items": NUM_ITEMS}),
    "dapo of one batch": ("bnpo", "token", dapo_loss, {}),
    "gspo": ("grpo", "sequence", gspo_loss, {}),
}
every_loss = pytest.mark.parametrize("name", list(GRPO_FAMILY))


def rollout(
    num_rows: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Policy, old and reference log-probs `[B, 6]`, advantages `[B]`, mask with one gap."""
    old = -torch.rand(num_rows, 6, dtype=dtype) * 2
    logps = (old + torch.randn_like(old) * 0.3).requires_grad_()
    ref = old + torch.randn_like(old) * 0.3
    mask = torch.arange(6) < torch.randint(2, 7, (num_rows, 1))
    mask[0, 1] = False
    return logps, old, ref, torch.randn(num_rows, dtype=dtype), mask


def two_completions() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ratios 1.5, 1 of the first, 0.5 of the second completion; advantages 1 and −1.

    Clipped to [0.8, 1.2] the terms are −min(1.5, 1.2) = −1.2, −1 and −min(−0.5, −0.8) = 0.8.
    """
    ratios = torch.tensor([[1.5, 1.0], [0.5, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    return ratios.log(), torch.zeros_like(ratios), torch.tensor([1.0, -1.0]).double(), mask


@pytest.mark.parametrize(
    ("loss", "given", "expected"),
    [
        # ½ [(−1.2 − 1)/2 + 0.8/1]
        (grpo_loss, {}, -0.15),
        # (−1.2 − 1 + 0.8) / (2 · 7)
        (dr_grpo_loss, {"max_completion_length": 7}, -0.1),
        # the same over 3 tokens, or over 10
        (dapo_loss, {"epsilon_high": 0.2}, -1.4 / 3),
        (dapo_loss, {"epsilon_high": 0.2, "num_items": 10}, -0.14),
        # first term clipped at 1.28 instead
        (dapo_loss, {}, -1.48 / 3),
        # s = √1.5 = 1.224745 and 0.5, clipped at 1.2 and 0.8: ½ (−1.2 + 0.8)
        (gspo_loss, {"epsilon_low": 0.2, "epsilon_high": 0.2}, -0.2),
    ],
)
def test_sum_worked_by_hand(loss: Loss, given: dict[str, float], expected: float) -> None:
    assert loss(*two_completions(), **given).loss.item() == pytest.approx(expected)


def test_clip_marks_worked_by_hand() -> None:
    """The first token is clipped from above, the second completion's from below."""
    found = grpo_loss(*two_completions())
    assert found.is_high_clipped.tolist() == [[True, False], [False, False]]
    assert found.is_low_clipped.tolist() == [[False, False], [True, False]]
    found = gspo_loss(*two_completions())
    assert found.is_high_clipped.tolist() == [True, False]
    assert found.is_low_clipped.tolist() == [False, True]


def test_kl_term_worked_by_hand() -> None:
    """log π = 0, log π_ref = log 2: k3 = 2 − 1 − log 2 = 0.306853; β = 0.5 adds 0.153426."""
    logps = torch.zeros(1, 1)
    found = grpo_loss(
        logps,
        logps,
        torch.zeros(1),
        torch.tensor([[True]]),
        ref_logps=torch.full((1, 1), math.log(2)),
        beta=0.5,
    )
    assert found.loss.item() == pytest.approx(0.153426, abs=1e-6)
    assert found.kl.item() == pytest.approx(0.306853, abs=1e-6)


def test_ppo_worked_by_hand() -> None:
    """The terms −1.2, −1, 0.8 of `two_completions`, over 3 tokens, or over 10."""
    logps, old, advantages, mask = two_completions()
    advantages = advantages.unsqueeze(1).expand(2, 2)
    assert ppo_loss(logps, old, advantages, mask).loss.item() == pytest.approx(-1.4 / 3)
    found = ppo_loss(logps, old, advantages, mask, num_items=10)
    assert found.loss.item() == pytest.approx(-0.14)


def test_rloo_worked_by_hand() -> None:
    """ρ = 1.5 and 0.5 with A = 1 and −1: ½ (−1.2 + 0.8) = −0.2."""
    logps = torch.tensor([1.5, 0.5]).log()
    found = rloo_loss(logps, torch.zeros(2), torch.tensor([1.0, -1.0]))
    assert found.loss.item() == pytest.approx(-0.2)
    assert found.is_high_clipped.tolist() == [True, False]


def test_rloo_first_epoch_is_reinforce() -> None:
    """At ρ = 1 the gradient is −A/B."""
    logps = torch.tensor([-3.0, -5.0], requires_grad=True)
    rloo_loss(logps, logps.detach(), torch.tensor([1.0, -3.0])).loss.backward()
    assert logps.grad.tolist() == [-0.5, 1.5]


def test_kl_penalised_rewards_worked_by_hand() -> None:
    """β = 0.5, KL 2 per token, rewards 10, 20, 30; the third completion is empty."""
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    found = kl_penalised_rewards(
        torch.tensor([10.0, 20.0, 30.0]), torch.full((3, 3), 2.0), mask, beta=0.5
    )
    assert found.tolist() == [[-1.0, 9.0, 0.0], [-1.0, 0.0, 19.0], [0.0, 0.0, 0.0]]


@every_loss
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_equals_trl(name: str, beta: float, num_rows: int, trl_grpo: Callable[..., Any]) -> None:
    loss_type, level, loss, own = GRPO_FAMILY[name]
    logps, old, ref, advantages, mask = rollout(num_rows)
    theirs = trl_grpo(
        loss_type,
        level,
        logps,
        old,
        ref,
        advantages,
        mask,
        NUM_ITEMS,
        beta=beta,
        max_completion_length=MAX_LENGTH,
        **CLIP,
    )
    reference = {"ref_logps": ref, "beta": beta} if beta else {}
    found = loss(logps, old, advantages, mask, **CLIP, **own, **reference)
    torch.testing.assert_close(found.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(each.loss, logps)[0] for each in (found, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    for side, marks in (("low", found.is_low_clipped), ("high", found.is_high_clipped)):
        share = marks.float().mean() if marks.ndim == 1 else marks[mask].float().mean()
        assert share.item() == pytest.approx(theirs.metrics[f"clip_ratio/{side}_mean"][0])
    if beta:
        assert found.kl[mask].mean().item() == pytest.approx(theirs.metrics["kl"][0], rel=1e-5)
    else:
        assert found.kl is None


def test_rloo_equals_trl(trl_rloo: Callable[..., Any]) -> None:
    logps, old, _, advantages, mask = rollout(5)
    old_seq_logps = seq_sum(old, mask)
    theirs = trl_rloo(logps, old_seq_logps, advantages, mask, **CLIP)
    found = rloo_loss(seq_sum(logps, mask), old_seq_logps, advantages, **CLIP)
    torch.testing.assert_close(found.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(each.loss, logps)[0] for each in (found, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    for side, marks in (("low", found.is_low_clipped), ("high", found.is_high_clipped)):
        share = marks.float().mean().item()
        assert share == pytest.approx(theirs.metrics[f"clip_ratio/{side}_mean"][0])


def test_ppo_is_dapo_with_an_advantage_per_token() -> None:
    logps, old, _, advantages, mask = rollout(4)
    expected = dapo_loss(logps, old, advantages, mask, epsilon_low=0.2, epsilon_high=0.2).loss
    found = ppo_loss(logps, old, advantages.unsqueeze(1).expand(4, 6), mask).loss
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_loss
def test_gradient(name: str) -> None:
    _, _, loss, own = GRPO_FAMILY[name]
    logps, old, ref, advantages, mask = rollout(4, torch.float64)
    given = {"ref_logps": ref, "beta": 0.3} | CLIP | own
    assert torch.autograd.gradcheck(
        lambda x: loss(x, old, advantages, mask, **given).loss, (logps,)
    )


def test_rloo_and_ppo_gradients() -> None:
    logps, old, _, advantages, mask = rollout(4, torch.float64)
    per_token = advantages.unsqueeze(1).expand(4, 6)
    assert torch.autograd.gradcheck(lambda x: ppo_loss(x, old, per_token, mask).loss, (logps,))
    seq_logps = (seq_sum(logps, mask) * 0.2).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: rloo_loss(x, seq_sum(old, mask) * 0.2, advantages).loss, (seq_logps,)
    )


@every_loss
def test_empty_completions_count_zero(name: str) -> None:
    """An empty completion beside a full one adds nothing but its place in the mean."""
    _, _, loss, own = GRPO_FAMILY[name]
    logps, old, ref, advantages, mask = rollout(3)
    mask[1:] = False
    given = {"ref_logps": ref, "beta": 0.3} | CLIP | own
    found = loss(logps, old, advantages, mask, **given).loss
    found.backward()
    assert torch.isfinite(logps.grad).all() and (logps.grad[~mask] == 0).all()
    alone = loss(
        logps[:1], old[:1], advantages[:1], mask[:1], **(given | {"ref_logps": ref[:1]})
    ).loss
    rows = 1 if loss is dapo_loss else 3
    torch.testing.assert_close(found, alone / rows)


@every_loss
@pytest.mark.parametrize("width", [0, 4])
def test_nothing_scored_gives_zero(name: str, width: int) -> None:
    _, _, loss, own = GRPO_FAMILY[name]
    logps = torch.randn(2, width)
    mask = torch.zeros(2, width, dtype=torch.bool)
    assert loss(logps, logps, torch.ones(2), mask, **own).loss.item() == 0
    assert ppo_loss(logps, logps, torch.ones(2, width), mask).loss.item() == 0


@every_loss
def test_padding_is_selected_away(name: str) -> None:
    _, _, loss, own = GRPO_FAMILY[name]
    logps, old, ref, advantages, mask = rollout(4)
    padded = [t.detach().masked_fill(~mask, float("nan")) for t in (logps, old, ref)]
    padded[0].requires_grad_()
    found = loss(padded[0], padded[1], advantages, mask, ref_logps=padded[2], beta=0.1, **own).loss
    expected = loss(logps, old, advantages, mask, ref_logps=ref, beta=0.1, **own).loss
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.backward()
    assert torch.isfinite(padded[0].grad).all()


@every_loss
def test_log_probs_far_apart_stay_finite(name: str) -> None:
    _, _, loss, own = GRPO_FAMILY[name]
    logps = torch.tensor([[0.0], [-500.0], [0.0]], requires_grad=True)
    old = torch.tensor([[-500.0], [0.0], [-500.0]])
    mask = torch.ones(3, 1, dtype=torch.bool)
    found = loss(logps, old, torch.tensor([0.0, 1.0, -1.0]), mask, **own).loss
    found.backward()
    assert torch.isfinite(found) and torch.isfinite(logps.grad).all()


@every_loss
def test_old_and_reference_receive_no_gradient(name: str) -> None:
    _, _, loss, own = GRPO_FAMILY[name]
    logps, old, ref, advantages, mask = rollout(3)
    fixed = [t.requires_grad_() for t in (old, ref, advantages)]
    loss(logps, old, advantages, mask, ref_logps=ref, beta=0.1, **own).loss.backward()
    assert logps.grad is not None
    assert all(t.grad is None for t in fixed)


@every_loss
@pytest.mark.parametrize(
    "given",
    [{"epsilon_low": -0.1}, {"epsilon_low": 1.1}, {"epsilon_high": 0.0}, {"beta": -0.1}],
    ids=str,
)
def test_hyperparameters_out_of_range_are_refused(name: str, given: dict[str, float]) -> None:
    _, _, loss, own = GRPO_FAMILY[name]
    logps, old, ref, advantages, mask = rollout(3)
    with pytest.raises(ValueError, match="was given, expected"):
        loss(logps, old, advantages, mask, ref_logps=ref, **own, **({"beta": 0.1} | given))


@every_loss
def test_beta_and_reference_belong_together(name: str) -> None:
    _, _, loss, own = GRPO_FAMILY[name]
    logps, old, ref, advantages, mask = rollout(3)
    with pytest.raises(ValueError, match=r"beta=0.1 was given without ref_logps"):
        loss(logps, old, advantages, mask, beta=0.1, **own)
    with pytest.raises(ValueError, match=r"beta=0.0 was given with ref_logps"):
        loss(logps, old, advantages, mask, ref_logps=ref, **own)


@every_loss
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    _, _, loss, own = GRPO_FAMILY[name]
    logps, old, _, advantages, mask = rollout(6)
    with pytest.raises(ValueError, match="expected"):
        loss(logps, old, advantages[:1], mask, **own)
    with pytest.raises(ValueError, match="expected one common shape"):
        loss(logps, old[:, :1], advantages, mask, **own)
    with pytest.raises(TypeError, match=r"expected torch\.bool"):
        loss(logps, old, advantages, mask.int(), **own)


def test_other_arguments_out_of_range_are_refused() -> None:
    logps, old, _, advantages, mask = rollout(3)
    with pytest.raises(ValueError, match="max_completion_length=0 was given"):
        dr_grpo_loss(logps, old, advantages, mask, max_completion_length=0)
    for epsilon in (0.0, 1.5):
        with pytest.raises(ValueError, match="was given, expected"):
            ppo_loss(logps, old, logps.detach(), mask, epsilon=epsilon)
    with pytest.raises(ValueError, match=r"advantages \[3\], expected one common"):
        ppo_loss(logps, old, advantages, mask)
    with pytest.raises(ValueError, match="was given, expected"):
        rloo_loss(advantages, advantages, advantages, epsilon_high=-1.0)
    with pytest.raises(ValueError, match="expected one common shape"):
        rloo_loss(advantages, advantages, advantages.unsqueeze(1))
    with pytest.raises(ValueError, match=r"beta=-1\.0 was given"):
        kl_penalised_rewards(advantages, logps, mask, beta=-1.0)
    with pytest.raises(ValueError, match=r"rewards has shape \[1\], expected \[3\]"):
        kl_penalised_rewards(advantages[:1], logps, mask, beta=0.1)


def test_kl_term_is_k3() -> None:
    logps, old, ref, advantages, mask = rollout(3)
    found = grpo_loss(logps, old, advantages, mask, ref_logps=ref, beta=0.1).kl
    torch.testing.assert_close(found, kl_k3(logps, ref).detach().where(mask, torch.tensor(0.0)))
