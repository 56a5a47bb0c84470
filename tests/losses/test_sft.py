"""SFT and DFT over scored tokens, and the reductions they rest on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpost.losses import dft_loss, seq_mean, seq_sum, sft_loss, token_mean

LOSSES = {"nll": sft_loss, "dft": dft_loss}


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logps = -torch.rand(3, 5, dtype=dtype) * 3
    return logps.requires_grad_(), torch.rand(3, 5) < 0.6


def test_sums_worked_by_hand() -> None:
    """log π = −1, −3 scored: NLL (1 + 3)/2 = 2, over 8 items 0.5.

    DFT (1 · e^−1 + 3 · e^−3)/2 = (0.367879 + 0.149361)/2 = 0.258620.
    """
    logps, mask = torch.tensor([[-1.0, -3.0, -7.0]]), torch.tensor([[True, True, False]])
    assert sft_loss(logps, mask).item() == 2.0
    assert sft_loss(logps, mask, 8).item() == 0.5
    assert sft_loss(logps, mask, torch.tensor(8)).item() == 0.5
    assert dft_loss(logps, mask).item() == pytest.approx(0.258620, abs=1e-6)


def test_dft_gradient_worked_by_hand() -> None:
    """The weight is a constant: d/dlogπ = −π/N = −0.5/1 at log π = log 0.5."""
    logps = torch.tensor([[0.5]]).log().requires_grad_()
    dft_loss(logps, torch.tensor([[True]])).backward()
    assert logps.grad.item() == pytest.approx(-0.5)


def test_reductions_worked_by_hand() -> None:
    """Rows 1, 3 and (none): sums 4, 0; means 2, 0; over all scored tokens 4/2 = 2."""
    values = torch.tensor([[1.0, 3.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert seq_sum(values, mask).tolist() == [4.0, 0.0]
    assert seq_mean(values, mask).tolist() == [2.0, 0.0]
    assert token_mean(values, mask).item() == 2.0


@pytest.mark.parametrize("loss_type", list(LOSSES))
@pytest.mark.parametrize("num_items", [None, 40])
def test_equals_trl(loss_type: str, num_items: int | None, trl_sft: Callable[..., Tensor]) -> None:
    logps, mask = batch()
    losses = [LOSSES[loss_type](logps, mask, num_items), trl_sft(loss_type, logps, mask, num_items)]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, logps)[0] for loss in losses]
    torch.testing.assert_close(*grads)


def test_sft_gradient() -> None:
    logps, mask = batch(torch.float64)
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, mask), (logps,))


@pytest.mark.parametrize("loss", list(LOSSES.values()))
@pytest.mark.parametrize("padding", [float("nan"), float("-inf")])
def test_padding_is_selected_away(loss: Callable[..., Tensor], padding: float) -> None:
    logps, mask = batch()
    padded = logps.detach().masked_fill(~mask, padding).requires_grad_()
    found = loss(padded, mask)
    torch.testing.assert_close(found, loss(logps, mask), rtol=0, atol=0)
    found.backward()
    assert (padded.grad[~mask] == 0).all() and torch.isfinite(padded.grad).all()


@pytest.mark.parametrize("loss", list(LOSSES.values()))
@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (3, 0)])
def test_a_batch_without_scored_tokens_gives_zero(
    loss: Callable[..., Tensor], shape: tuple[int, int]
) -> None:
    logps = -torch.rand(shape).requires_grad_()
    assert loss(logps, torch.zeros(shape, dtype=torch.bool)).item() == 0
    assert loss(logps, torch.zeros(shape, dtype=torch.bool), 0).item() == 0


@pytest.mark.parametrize("loss", list(LOSSES.values()))
def test_masks_of_numbers_and_other_shapes_are_refused(loss: Callable[..., Tensor]) -> None:
    logps, mask = batch()
    with pytest.raises(
        TypeError, match=r"int64, expected torch\.bool .*; pass response_mask\.bool"
    ):
        loss(logps, mask.long())
    with pytest.raises(ValueError, match=r"response_mask \[3, 1\], expected one common shape"):
        loss(logps, mask[:, :1])


def test_half_precision_is_summed_in_fp32() -> None:
    """4096 times 1 is 4096; a bf16 running sum stops at 256."""
    logps = -torch.ones(1, 4096, dtype=torch.bfloat16)
    assert sft_loss(logps, torch.ones(1, 4096, dtype=torch.bool), 1).item() == 4096
