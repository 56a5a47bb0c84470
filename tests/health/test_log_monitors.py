"""Each monitor of logs fires on a history with its illness and is silent on a healthy one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import pytest

from fastpost.health import (
    Finding,
    LengthDrift,
    ModeCollapse,
    OverusedOpenings,
    Reading,
    RewardHacking,
    ZeroVarianceGroups,
)
from fastpost.health.mode_collapse import distinct_ngrams
from fastpost.health.reading import numbers
from fastpost.health.series import Series

STEPS = 60
OPTIONS = {"beta": 0.01, "learning_rate": 1e-5}


def noisy(start: float, end: float, noise: float, seed: int = 0) -> list[float]:
    chance = random.Random(seed)
    slope = (end - start) / (STEPS - 1)
    return [start + slope * i + chance.gauss(0, noise) for i in range(STEPS)]


def observe(monitor, logs: Iterable[dict[str, object]]) -> list[Finding]:
    """Findings of a run; `texts` in a log are its completions."""
    found = []
    for step, log in enumerate(logs, start=1):
        texts = log.pop("texts", ())
        found.append(monitor.observe(Reading(step, numbers(log), texts, OPTIONS)))
    return [finding for finding in found if finding is not None]


def logs(**series: list[float]) -> list[dict[str, object]]:
    names = {name: name.replace("__", "/") for name in series}
    return [
        {names[name]: value for name, value in zip(series, values, strict=True)}
        for values in zip(*series.values(), strict=True)
    ]


RISING = noisy(0.2, 0.8, 0.05)
JUDGE = {"trusted": ("rewards/judge/mean",)}


@pytest.mark.parametrize("seed", range(5))
def test_reward_up_and_judge_down(seed) -> None:
    judge = noisy(0.7, 0.3, 0.05, seed + 10)
    found = observe(RewardHacking(**JUDGE), logs(reward=RISING, rewards__judge__mean=judge))
    assert found[0].illness == "reward rises while rewards/judge/mean falls"
    assert "raise KL beta 0.01 -> 0.05" in found[0].fix and "1e-05 -> 5e-06" in found[0].fix
    assert found[0].step < STEPS - 10


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("reward", "judge"), [(RISING, (0.3, 0.7)), (RISING, (0.5, 0.5)), (None, (0.5, 0.5))]
)
def test_reward_and_judge_together_or_by_chance(reward, judge, seed) -> None:
    reward = reward or noisy(0.5, 0.5, 0.05, seed + 50)
    history = logs(reward=reward, rewards__judge__mean=noisy(*judge, 0.05, seed + 10))
    assert observe(RewardHacking(**JUDGE), history) == []


def test_a_judge_that_falls_with_the_reward_is_another_illness() -> None:
    falling = noisy(0.8, 0.2, 0.05)
    assert observe(RewardHacking(**JUDGE), logs(reward=falling, rewards__judge__mean=falling)) == []


@pytest.mark.parametrize(("held_out", "is_ill"), [((0.6, 0.3), True), ((0.3, 0.6), False)])
def test_held_out_reward_is_compared_at_every_evaluation(held_out, is_ill) -> None:
    history = []
    for step, (reward, trusted) in enumerate(zip(RISING, noisy(*held_out, 0.01), strict=True)):
        history.append({"reward": reward})
        if step % 10 == 9:
            history.append({"eval_reward": trusted})
    assert bool(observe(RewardHacking(), history)) is is_ill


def test_reward_hacking_after_a_common_rise() -> None:
    """Over-optimisation: the judge rises with the reward, then passes its peak."""
    judge = [0.5 + 0.3 * math.sin(math.pi * i / STEPS) for i in range(STEPS)]
    found = observe(RewardHacking(**JUDGE), logs(reward=RISING, rewards__judge__mean=judge))
    assert found and found[0].step > STEPS // 2


@pytest.mark.parametrize(
    ("name", "kl", "is_ill"),
    [
        ("kl", 0.8, True),
        ("kl", 0.2, False),
        ("objective__kl", 80.0, True),
        ("objective__kl", 20.0, False),
    ],
)
def test_kl_beyond_its_limit(name, kl, is_ill) -> None:
    found = observe(RewardHacking(), logs(reward=RISING, **{name: noisy(0, kl, 0.01)}))
    assert bool(found) is is_ill
    assert all(f.illness == "the policy has left its reference" for f in found)


def test_kl_and_entropy_of_runs_without_rollouts_mean_something_else() -> None:
    history = logs(kl=noisy(0, 90, 1), entropy=noisy(2, 0.05, 0.01))
    assert observe(RewardHacking(), [dict(log) for log in history]) == []
    assert observe(ModeCollapse(), history) == []


def texts(count: int, same: int, step: int) -> list[str]:
    """`same` of `count` completions begin alike, all go on differently."""
    return [
        ("As a helpful assistant, I " if i < same else f"so {step} then {i} we ")
        + " ".join(f"w{step * 7 + i * 3 + k}" for k in range(9))
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("first", "last", "is_ill"), [(0, 8, True), (0, 3, False), (8, 8, False), (0, 0, False)]
)
def test_openings(first, last, is_ill) -> None:
    history = [
        {"reward": 1.0, "texts": texts(8, first if step < 30 else last, step)}
        for step in range(STEPS)
    ]
    found = observe(OverusedOpenings(), history)
    assert bool(found) is is_ill
    assert all("'As a helpful assistant, I'" in finding.figures for finding in found)


@pytest.mark.parametrize(("end", "is_ill"), [(0.1, True), (1.0, False)])
def test_entropy(end, is_ill) -> None:
    found = observe(ModeCollapse(), logs(reward=RISING, entropy=noisy(1.5, end, 0.05)))
    assert bool(found) is is_ill
    assert all(f.illness == "entropy collapses" and "entropy_coef" in f.fix for f in found)


@pytest.mark.parametrize(("is_ill"), [True, False])
def test_repeated_words(is_ill) -> None:
    def drawn(step: int) -> list[str]:
        if is_ill and step >= 30:
            return ["yes yes yes yes yes yes"] * 8
        return texts(8, 0, step)

    history = [{"reward": 1.0, "texts": drawn(step)} for step in range(STEPS)]
    found = observe(ModeCollapse(), history)
    assert bool(found) is is_ill
    assert all(f.illness == "completions repeat each other" for f in found)


@pytest.mark.parametrize(
    ("std", "reward", "is_ill"),
    [((0.5, 0.0), (0.1, 0.1), True), ((0.5, 0.0), (0.1, 1.0), False), ((0.5, 0.4), (0, 0), False)],
)
def test_reward_spread(std, reward, is_ill) -> None:
    history = logs(reward=noisy(*reward, 0.01), reward_std=noisy(*std, 0.001))
    assert bool(observe(ModeCollapse(), history)) is is_ill


def test_distinct_ngrams_by_hand() -> None:
    # a b, b a, a b and a b: four bigrams, two different ones.
    assert distinct_ngrams(["a b a b", "a b"]) == 2 / 4
    assert distinct_ngrams(["a", ""]) is None


@pytest.mark.parametrize(
    ("end", "illness"),
    [(700, "completions grow"), (30, "completions shrink"), (250, None), (180, None)],
)
def test_length(end, illness) -> None:
    found = observe(LengthDrift(), logs(completions__mean_length=noisy(200, end, 5)))
    assert {finding.illness for finding in found} == ({illness} if illness else set())
    if illness == "completions grow":
        assert "fastpost.rewards.length" in found[0].fix


@pytest.mark.parametrize(
    ("name", "share", "is_ill"),
    [
        ("completions/clipped_ratio", 0.5, True),
        ("completions/clipped_ratio", 0.1, False),
        ("completions/ended", 0.5, True),
        ("val/contain_eos_token", 0.9, False),
    ],
)
def test_truncation(name, share, is_ill) -> None:
    found = observe(LengthDrift(), [{name: share} for _ in range(STEPS)])
    assert bool(found) is is_ill
    assert all(finding.illness == "completions are cut off" for finding in found)


@pytest.mark.parametrize(("share", "is_ill"), [(0.8, True), (0.3, False)])
def test_zero_variance(share, is_ill) -> None:
    found = observe(
        ZeroVarianceGroups(), logs(reward=RISING, frac_reward_zero_std=noisy(share, share, 0.05))
    )
    assert bool(found) is is_ill
    assert all("against 50%" in f.figures and "harder prompts" in f.fix for f in found)


def test_one_bad_reading_is_no_illness() -> None:
    one = [1.0 if i == 30 else 0.2 for i in range(STEPS)]
    assert observe(ZeroVarianceGroups(), logs(frac_reward_zero_std=one)) == []
    assert observe(LengthDrift(), logs(completions__clipped_ratio=one)) == []


def test_readings_keep_finite_numbers_only() -> None:
    found = numbers({"reward": float("nan"), "kl": None, "objective/scores": 2, "x": "text"})
    assert found == {"objective/scores": 2.0, "reward": 2.0}


def test_noise_of_a_series_is_that_of_a_difference_of_means() -> None:
    series = Series(window=8)
    chance = random.Random(3)
    for i in range(4000):  # a drift that a plain standard deviation would count as noise
        series.add(i * 0.001 + chance.gauss(0, 2.0))
    assert series.noise == pytest.approx(2.0 * math.sqrt(2 / 8), rel=0.1)
    assert series.start < series.recent


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthDrift(window=0), "window must be at least 1"),
        (lambda: OverusedOpenings(num_words=0), "num_words is 0"),
    ],
)
def test_impossible_settings(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
