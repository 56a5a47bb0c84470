"""The figures of the mismatch meter, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastpost.rollout.mismatch import Mismatch, MismatchMeter, mismatch


def test_hand_computed_figures() -> None:
    """Ratios 1, 2 and 1/2; the fourth token is not sampled, the fifth not known.

    k1 = −(0 + ln 2 − ln 2)/3 = 0;  k3 = (0 + (2 − 1 − ln 2) + (½ − 1 + ln 2))/3 = 1/6
    ess = (1 + 2 + ½)² / (3 (1 + 4 + ¼)) = 12.25 / 15.75
    p99 lies 0.98 of the way from the second largest to the largest: 1 + 0.98.
    """
    ln2 = math.log(2)
    rollout = torch.tensor([[-1.0, -1.0 - ln2, -1.0], [-9.0, float("nan"), 0.0]])
    trainer = torch.tensor([[-1.0, -1.0, -1.0 - ln2], [-1.0, -1.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 0]])
    found = mismatch(rollout, trainer, mask)
    assert found.tokens == 3
    assert found.kl_k1 == pytest.approx(0.0, abs=1e-7)
    assert found.kl == pytest.approx(1 / 6, abs=1e-7)
    assert found.ess == pytest.approx(12.25 / 15.75, abs=1e-7)
    assert found.p99_ratio == pytest.approx(1.98, abs=1e-6)
    assert found.max_ratio == pytest.approx(2.0, abs=1e-6)
    assert found.metrics() == {
        "rollout/kl": found.kl,
        "rollout/kl_k1": found.kl_k1,
        "rollout/ess": found.ess,
        "rollout/p99_ratio": found.p99_ratio,
        "rollout/max_ratio": found.max_ratio,
    }


def test_estimates_the_divergence_of_two_known_distributions() -> None:
    """Tokens drawn from one distribution over four: k1 and k3 both tend to the true KL."""
    torch.manual_seed(0)
    rollout = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    trainer = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    true_kl = float((rollout * (rollout / trainer).log()).sum())
    true_ess = 1 / float((trainer.square() / rollout).sum())
    tokens = torch.multinomial(rollout, 200_000, replacement=True)
    found = mismatch(rollout.log()[tokens], trainer.log()[tokens], torch.ones_like(tokens))
    assert found.kl == pytest.approx(true_kl, rel=0.02)
    assert found.kl_k1 == pytest.approx(true_kl, rel=0.03)
    assert found.ess == pytest.approx(true_ess, rel=0.02)


def test_equal_models_and_empty_batches_are_equal() -> None:
    logps = torch.randn(3, 5)
    assert mismatch(logps, logps, torch.ones(3, 5)) == Mismatch(15, 0.0, 0.0, 1.0, 1.0, 1.0)
    assert mismatch(logps, logps + 1, torch.zeros(3, 5)) == Mismatch(0, 0.0, 0.0, 1.0, 1.0, 1.0)


def test_ratios_beyond_the_range_of_floats_leave_the_share_finite() -> None:
    found = mismatch(torch.tensor([-900.0, -1.0]), torch.tensor([-1.0, -1.0]), torch.ones(2))
    assert found.ess == pytest.approx(0.5)
    assert found.kl == math.inf


def test_the_limit_stops_the_run_and_says_why() -> None:
    rollout, trainer, mask = torch.zeros(4), torch.full((4,), -0.5), torch.ones(4)
    expected = math.exp(-0.5) - 1 + 0.5
    assert MismatchMeter().measure(rollout, trainer, mask).kl == pytest.approx(expected)
    meter = MismatchMeter(limit=expected + 1e-3)
    assert meter.measure(rollout, trainer, mask) is meter.last
    with pytest.raises(RuntimeError, match=r"KL 0\.107 nats.*4 tokens, limit 0\.1 .*stale weights"):
        MismatchMeter(limit=0.1).measure(rollout, trainer, mask)
    with pytest.raises(RuntimeError, match="KL nan"):
        MismatchMeter(limit=0.1).measure(rollout, trainer * float("nan"), mask)


def test_figures_are_the_mean_over_processes() -> None:
    """Another process measured twice as much of everything."""
    rollout, trainer, mask = torch.zeros(4), torch.full((4,), -0.5), torch.ones(4)
    meter = MismatchMeter()
    alone = meter.measure(rollout, trainer, mask).metrics()
    both = meter.metrics(rollout, trainer, mask, lambda local: torch.cat([local, 2 * local]))
    assert both == pytest.approx({name: 1.5 * value for name, value in alone.items()})


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_stops_every_run_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="rollout_mismatch_limit must be positive"):
        MismatchMeter(limit)
