"""Several judges: weights by hand-worked numbers, human labels, flags, and judges gone wrong."""

from __future__ import annotations

import numpy as np
import pytest

from fastpost.judges.agreement import agreement_weights, combine_by_agreement
from fastpost.judges.judge import answer_rows
from fastpost.judges.panel import Panel
from fastpost.judges.tasks import Criterion, Grade
from tests.judges.fake_judges import FakeModel, Judge, comparer, grader


def test_agreement_weighs_by_hand_worked_numbers() -> None:
    # Medians are 0.5 and 0.5; distances 0, 0, 0.5; weights 20, 20, 1 / 0.55.
    scores = [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]
    outlier = 1 / 0.55
    expected = [(20 + outlier) / (40 + outlier), 20 / (40 + outlier)]
    assert combine_by_agreement(scores) == pytest.approx(expected, abs=1e-12)
    assert combine_by_agreement([[None, 0.3], [None, None]]) == [None, pytest.approx(0.3)]
    with pytest.raises(ValueError, match="same length"):
        combine_by_agreement([[0.1], [0.1, 0.2]])


def test_human_labels_weigh_by_hand_worked_numbers() -> None:
    # All agree on the first row. The label of the second is 1: distances 0, 0.5, 0.5, mean 1/3;
    # h = (d + 5/3) / 6. Medians: 0.5 and 0.5, so d_i of the others is 0.25, 0, 0.
    scores = [[0.5, 1.0], [0.5, 0.5], [0.5, 0.5]]
    mean = 1 / 3
    expected = [
        1 / (0.05 + 0.25) / (0.05 + (0 + 5 * mean) / 6),
        1 / 0.05 / (0.05 + (0.5 + 5 * mean) / 6),
        1 / 0.05 / (0.05 + (0.5 + 5 * mean) / 6),
    ]
    assert agreement_weights(scores, [None, 1.0]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="1 human labels for 2 rows"):
        agreement_weights(scores, [1.0])


def test_many_labels_let_the_judge_that_is_right_win() -> None:
    """Two judges share an error; labels overrule their majority, and without any they win."""
    rng = np.random.default_rng(0)
    truth = rng.random(200)
    wrong = 1 - truth
    scores = [s.clip(0, 1).tolist() for s in (truth, wrong, wrong + 0.01)]
    labelled = [t if i < 100 else None for i, t in enumerate(truth.tolist())]
    without = agreement_weights(scores)
    with_labels = agreement_weights(scores, labelled)
    assert without[0] < without[1] and with_labels[0] / without[0] > 5 * (
        with_labels[1] / without[1]
    )


def test_an_odd_judge_is_outweighed() -> None:
    grades = {"good": 9, "bad": 1}
    sober = [grader(lambda text, k=k: grades[text] - k, name=f"sober {k}") for k in (0, 1)]
    drunk = grader(lambda text: 10 - grades[text], name="drunk")
    verdict = Panel([*sober, drunk]).grade("c", ["p"] * 2, ["good", "bad"])
    assert verdict.values[0] > 0.7 and verdict.values[1] < 0.2
    assert sum(verdict.weights) == pytest.approx(1) and verdict.weights[2] == min(verdict.weights)
    assert "drunk: weight 0.0" in str(verdict) and verdict.single_judged == [False, False]


def test_rows_of_fewer_than_two_judges_are_flagged() -> None:
    steady = grader(lambda text: 8, name="steady")
    wavering = [
        grader(lambda text: None if text == "hard" else 4, name=f"w{i}", attempts=1)
        for i in range(2)
    ]
    verdict = Panel([steady, *wavering]).grade("c", ["p"] * 2, ["easy", "hard"])
    assert verdict.single_judged == [False, True] and verdict.values[1] == pytest.approx(0.8)
    assert "1 with fewer than two" in str(verdict)
    nobody = Panel(wavering, min_judges=2).grade("c", ["p"], ["hard"])
    assert nobody.values == [None] and nobody.single_judged == [True]


def test_pairs_report_every_judges_position_bias() -> None:
    honest = [comparer(lambda a, b: "A" if a > b else "B", name=f"h{i}") for i in range(2)]
    first = comparer(lambda a, b: "A", name="first")
    verdict = Panel([*honest, first]).prefer("c", ["p"] * 3, list("xbz"), list("ayc"))
    assert [value > 0.5 for value in verdict.values] == [True, False, True]
    assert [bias.is_biased for bias in verdict.biases] == [False, False, True]
    assert "first: weight" in str(verdict) and "favoured by 50.0%" in str(verdict)


def test_a_rubric_is_combined_by_criterion() -> None:
    rubric = [Criterion("tone", "polite"), Criterion("truth", "no error", 3)]
    judges = [
        Judge(FakeModel(lambda t, seed: '{"tone": 2, "truth": 10}', f"j{i}")) for i in range(3)
    ]
    verdict = Panel(judges).rubric(rubric, ["p"], ["a"])
    assert verdict.values == [pytest.approx(0.8)]
    assert verdict.criteria == {"tone": [pytest.approx(0.2)], "truth": [pytest.approx(1.0)]}


def test_panels_are_three_of_different_names() -> None:
    judges = [grader(lambda text: 1, name=f"j{i}") for i in range(3)]
    with pytest.raises(ValueError, match="2 judges; give at least 3"):
        Panel(judges[:2])
    with pytest.raises(ValueError, match="its own name"):
        Panel([*judges, judges[0]])
    with pytest.raises(ValueError, match="at least 1"):
        Panel([], min_judges=0)
    assert Panel(judges).estimate(Grade("c"), answer_rows(["p"], ["a"])).calls == 3
