"""Intervals, regressions, win rates."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fastpost.pipeline import scorers
from fastpost.pipeline.evaluation import best_so_far, regressions, score, table


@pytest.mark.parametrize(("right", "n"), [(0, 8), (3, 8), (57, 200), (200, 200)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    found = score([1.0] * right + [0.0] * (n - right), 0.1)
    # the shares p that the normal test at 95 % does not reject: (mean - p)^2 = z^2 p (1 - p) / n
    mean, z = right / n, 1.959963984540054
    low, high = sorted(np.roots([1 + z**2 / n, -2 * mean - z**2 / n, mean**2]).real)
    assert found["value"] == mean
    assert found["low"] == pytest.approx(low, abs=1e-6)
    assert found["high"] == pytest.approx(high, abs=1e-6)


def test_nothing_scored_is_no_score() -> None:
    with pytest.raises(ValueError, match="nothing was scored"):
        score([], 0.1)


def test_a_fall_within_the_tolerance_is_none() -> None:
    before = {"a": {"exam": score([1, 1, 0, 0], 0.25)}}
    assert regressions({"exam": score([1, 0, 0, 0], 0.25)}, best_so_far(before)) == []
    assert regressions({"exam": score([0, 0, 0, 0], 0.25)}, best_so_far(before))
    assert regressions({"new": score([0], 0.25)}, best_so_far(before)) == []
    assert "exam" in table(before) and "a" in table(before)


class LikesLong:
    """A judge's model that prefers the longer answer, wherever it stands."""

    identity: dict[str, Any]

    def __init__(self) -> None:
        self.identity = {"model": "likes-long"}

    def __call__(self, conversations: Any, *, seed: int) -> list[str]:
        replies = []
        for conversation in conversations:
            text = conversation[-1]["content"]
            long_one = text.rfind("longer" * 3)
            other = text.rfind("brief")
            replies.append(json.dumps({"better": "A" if long_one < other else "B"}))
        return replies


def test_the_win_rate_is_against_the_first_model_in_both_orders(monkeypatch) -> None:
    monkeypatch.setattr(scorers, "chat_model_of", lambda given: LikesLong())
    asked = [{"name": "wins", "judge": {}, "criteria": "length"}, [[{"content": "q"}]] * 4]
    replies = ["longer" * 3, "longer" * 3, "longer" * 3, "brief"]
    firsts = ["brief", "brief", "brief", "longer" * 3]
    before = {"replies": {"wins": firsts}}
    assert scorers._preferred(*asked, replies, before) == [1.0, 1.0, 1.0, 0.0]
    assert scorers._preferred(*asked, firsts, None) == [0.5] * 4
