"""Length-desensitised log-probs: the tail behind the shorter answer's length counts α."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost.losses import dpo_loss, ld_seq_logps, seq_sum


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Token log-probs `[6, 7]` and mask: three pairs, chosen first, lengths 1 to 7."""
    seq_lens = torch.tensor([7, 2, 4, 3, 6, 4])
    logps = -torch.rand(6, 7, dtype=dtype)
    return logps.requires_grad_(), torch.arange(7) < seq_lens.unsqueeze(1)


def test_sum_worked_by_hand() -> None:
    """Chosen −1, −2, −4, rejected −3: shared length 1, α = 0.5.

    Chosen −1 + 0.5 (−2 − 4) = −4, rejected −3.
    """
    found = ld_seq_logps(
        torch.tensor([[-1.0, -2.0, -4.0]]),
        torch.tensor([[-3.0, -9.0]]),
        torch.tensor([[True, True, True]]),
        torch.tensor([[True, False]]),
        ld_alpha=0.5,
    )
    assert found.chosen_seq_logps.tolist() == [-4.0]
    assert found.rejected_seq_logps.tolist() == [-3.0]


def test_positions_are_counted_among_scored_tokens() -> None:
    """With a gap: the second scored token of the chosen answer is its tail."""
    found = ld_seq_logps(
        torch.tensor([[-1.0, -100.0, -2.0]]),
        torch.tensor([[-100.0, -100.0, -3.0]]),
        torch.tensor([[True, False, True]]),
        torch.tensor([[False, False, True]]),
        ld_alpha=0.5,
    )
    assert found.chosen_seq_logps.tolist() == [-2.0]
    assert found.rejected_seq_logps.tolist() == [-3.0]


def test_alpha_one_is_the_plain_sum() -> None:
    logps, mask = batch()
    chosen, rejected = ld_seq_logps(*logps.chunk(2), *mask.chunk(2), ld_alpha=1.0)
    torch.testing.assert_close(torch.cat([chosen, rejected]), seq_sum(logps, mask))


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
def test_equals_trl(ld_alpha: float, trl_dpo: Callable[..., Any]) -> None:
    logps, mask = batch()
    ref = torch.randn(6)
    theirs = trl_dpo("sigmoid", logps, ref, mask, ld_alpha=ld_alpha).loss
    policy = ld_seq_logps(*logps.chunk(2), *mask.chunk(2), ld_alpha=ld_alpha)
    found = dpo_loss(*policy, *ref.chunk(2)).loss.mean()
    torch.testing.assert_close(found, theirs)
    grads = [torch.autograd.grad(loss, logps)[0] for loss in (found, theirs)]
    torch.testing.assert_close(*grads)


def test_gradient() -> None:
    logps, mask = batch(torch.float64)

    def both(x: Tensor) -> Tensor:
        return torch.cat(ld_seq_logps(*x.chunk(2), *mask.chunk(2), ld_alpha=0.3))

    assert torch.autograd.gradcheck(both, (logps,))


def test_an_empty_completion_leaves_only_tail() -> None:
    logps, mask = batch()
    mask[3] = False
    chosen, rejected = ld_seq_logps(*logps.chunk(2), *mask.chunk(2), ld_alpha=0.5)
    assert rejected[0] == 0
    torch.testing.assert_close(chosen[0], 0.5 * logps[0].sum())


@pytest.mark.parametrize("ld_alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range_is_refused(ld_alpha: float) -> None:
    logps, mask = batch()
    with pytest.raises(ValueError, match=r"ld_alpha=.* was given, expected 0.0 <= ld_alpha <= 1.0"):
        ld_seq_logps(*logps.chunk(2), *mask.chunk(2), ld_alpha=ld_alpha)
