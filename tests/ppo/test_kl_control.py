from __future__ import annotations

import pytest

from fastpost.ppo.kl_control import KLController


def test_a_fixed_weight_stays() -> None:
    controller = KLController(0.05, None, 100)
    controller.update(1e6, 100)
    assert controller.coefficient == 0.05


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1.0 + 0.1 * 64 / 1000),  # a tenth above
        (600.0, 1.0 + 0.2 * 64 / 1000),  # error cut at a fifth
        (0.0, 1.0 - 0.2 * 64 / 1000),
        (-3.0, 1.0 - 0.2 * 64 / 1000),  # k1 may be negative
    ],
)
def test_a_steered_weight(kl: float, factor: float) -> None:
    controller = KLController(0.1, 6.0, 1000)
    controller.update(kl, 64)
    assert controller.coefficient == pytest.approx(0.1 * factor, rel=1e-12)
