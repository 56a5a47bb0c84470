"""Answers compared by math-verify in a worker that can be late, from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from fastpost.rewards.maths import MathsComparer, maths_reward


@pytest.fixture(scope="module")
def comparer() -> Iterator[MathsComparer]:
    with MathsComparer(timeout_seconds=2.0) as comparer:
        yield comparer


def test_equal_answers_score_one_and_others_zero(comparer: MathsComparer) -> None:
    reward = maths_reward(comparer, gold_column="gold")
    completions = [
        r"So the answer is $\boxed{\frac{1}{2}}$.",
        [{"role": "assistant", "content": r"$\boxed{0.5}$"}],
        r"$\boxed{\frac{1}{3}}$",
        "I do not know.",
    ]
    golds = [r"\frac12", r"$\frac{1}{2}$", "0.5", "7"]
    assert reward([""] * 4, completions, gold=golds) == [1.0, 1.0, 0.0, 0.0]


def test_undelimited_latex_gold_is_read_whole(comparer: MathsComparer) -> None:
    assert comparer.compare(r"3\sqrt{2}", r"$\boxed{3\sqrt{2}}$") == 1.0
    assert comparer.compare(r"3\sqrt{2}", r"$\boxed{3}$") == 0.0
    assert comparer.compare("2x+1", r"$\boxed{1+2x}$") == 1.0


def test_unparseable_gold_is_not_scored(comparer: MathsComparer) -> None:
    golds = ["", "no idea", None]
    assert maths_reward(comparer)([""] * 3, [r"$\boxed{1}$"] * 3, solution=golds) == [None] * 3


def test_a_late_answer_scores_zero_off_the_main_thread_and_leaves_nothing() -> None:
    results: list[object] = []
    with MathsComparer(timeout_seconds=1.0) as comparer:
        assert comparer.compare("1", r"$\boxed{1}$") == 1.0
        worker = comparer._process
        assert worker is not None

        def late() -> None:
            start = time.monotonic()
            results.append(comparer.compare("7", r"$\boxed{(10^{10^{10}})!}$"))
            results.append(time.monotonic() - start)
            results.append(comparer.compare("2", r"$\boxed{2}$"))

        thread = threading.Thread(target=late)
        thread.start()
        thread.join()
        assert results[0] == 0.0 and results[2] == 1.0
        assert isinstance(results[1], float) and results[1] < 5
        replacement = comparer._process
    assert worker.poll() is not None, "the late worker was left running"
    assert replacement is not None and replacement.poll() is not None


def test_the_gold_column_must_exist(comparer: MathsComparer) -> None:
    with pytest.raises(ValueError, match=r"no column 'solution'.*'answer'"):
        maths_reward(comparer)([""], [""], answer=["1"])
    with pytest.raises(ValueError, match="timeout_seconds is 0"):
        MathsComparer(timeout_seconds=0)
