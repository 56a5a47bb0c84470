"""Grades of judges as a TRL reward."""

from __future__ import annotations

import pytest

from fastpost.rewards.judge import JudgeReward, grade, openai_judge, prefer, prompt_text
from tests.chat_model.endpoint_server import reply, serving
from tests.judges.fake_judges import comparer, grader


def test_an_endpoint_grades() -> None:
    with serving(lambda body: reply('{"grade": 7}')) as server:
        judge = openai_judge(server.url, "some-model", api_key="key")
        assert grade(judge, "truth", "2+2?", "4") == 0.7
        assert JudgeReward([judge], "truth")(["2+2?"], ["4"]) == [pytest.approx(0.7)]
    assert server.received[0]["model"] == "some-model"
    assert server.headers[0]["Authorization"] == "Bearer key"


def test_one_pair_is_compared_both_ways_round() -> None:
    honest = comparer(lambda a, b: "A" if a == "poem" else "B")
    assert prefer(honest, "c", "p", "poem", "lump") == 1.0
    assert prefer(comparer(lambda a, b: "A"), "c", "p", "x", "y") == 0.5


def test_single_judged_rows_are_flagged() -> None:
    wavering = grader(lambda text: None if text == "hard" else 4, name="wavering", attempts=1)
    reward = JudgeReward([grader(lambda text: 8), wavering], "truth")
    assert reward.single_judged == []
    scores = reward(["p", "p"], ["easy", [{"role": "assistant", "content": "hard"}]])
    assert scores == pytest.approx([0.6, 0.8]) and reward.single_judged == [False, True]
    alone = JudgeReward([wavering], "truth")
    assert alone(["p", "p"], ["easy", "hard"]) == [pytest.approx(0.4), None]
    assert alone.single_judged == [True, True]


def test_what_cannot_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="no judges"):
        JudgeReward([], "truth")
    with pytest.raises(ValueError, match="no criteria"):
        JudgeReward([grader(lambda text: 1)], "  ")


def test_a_conversation_is_read_turn_by_turn() -> None:
    assert prompt_text("q") == prompt_text([{"role": "user", "content": "q"}]) == "q"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert prompt_text(turns) == "system: s\n\nuser: q"
