"""Online DPO: what a judge or reward is asked, what becomes of its word, and kills."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastpost.loops.journal import Journal
from fastpost.loops.online_judge import _JudgedPairs, _Remembered, online_judge
from tests.loops.conftest import TRAINING, Calls, user
from tests.trainers.methods import letter_sum

PROMPTS = [{"prompt": user(f"write {i}"), "level": i} for i in range(8)]
ONLINE = TRAINING | {"max_new_tokens": 6, "max_length": 64, "temperature": 1.0}


class FakeJudge:
    """Prefers the answer with the higher letter sum."""

    def __init__(self, call=lambda **asked: None) -> None:
        self._call = call

    def prefer(self, criteria, prompts, firsts, seconds):
        self._call(criteria=criteria, prompts=prompts, firsts=firsts, seconds=seconds)
        pairs = zip(letter_sum(firsts), letter_sum(seconds), strict=True)
        return SimpleNamespace(values=[float(a > b) if a != b else None for a, b in pairs])


def completions(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_a_verdict_reaches_both_answers_of_its_pair(tmp_path) -> None:
    asked = []
    with Journal(tmp_path, {}) as journal:
        reward = _JudgedPairs(journal, FakeJudge(lambda **a: asked.append(a)), "be kind")
        prompts = [user("p"), user("q")] * 2
        answers = completions("a", "zz", "b", "zz")  # p: a or b, q: a tie
        assert reward(prompts, answers, level=[1, 2, 1, 2]) == [0.0, 0.5, 1.0, 0.5]
        assert reward(prompts, answers) == [0.0, 0.5, 1.0, 0.5]
        swapped = completions("b", "zz", "a", "zz")
        assert reward(prompts, swapped) == [1.0, 0.5, 0.0, 0.5]
    assert asked == [
        {
            "criteria": "be kind",
            "prompts": ["p", "q"],
            "firsts": ["a", "zz"],
            "seconds": ["b", "zz"],
        },
        {"criteria": "be kind", "prompts": ["p"], "firsts": ["b"], "seconds": ["a"]},
    ]


def test_a_reward_is_asked_once_about_an_answer_and_its_columns(tmp_path) -> None:
    asked = []

    def score(prompts, completions, level, completion_ids):
        asked.append((len(prompts), level, completion_ids))
        return [None if lv == 0 else float(lv) for lv in level]

    with Journal(tmp_path, {}) as journal:
        reward = _Remembered(journal, score)
        rows = {"prompts": [user("p")] * 3, "completions": completions("a", "a", "b")}
        ids = [[1], [1], [2]]
        for state in (1, 2):
            said = reward(**rows, level=[0, 2, 3], completion_ids=ids, trainer_state=state)
            assert said == [None, 2.0, 3.0]
        assert reward(**rows, level=[0, 2, 4], completion_ids=ids) == [None, 2.0, 4.0]
    assert asked == [(3, [0, 2, 3], ids), (1, [4], [[2]])]


@pytest.mark.parametrize("kind", ["judge", pytest.param("rewards", marks=pytest.mark.slow)])
def test_a_kill_at_any_point_costs_nothing(model, tokenizer, killed_everywhere, kind) -> None:
    def loop(calls: Calls, folder):
        who = {
            "judge": {"judge": FakeJudge(calls.function(dict, "judge")), "criteria": "be short"},
            "rewards": {
                "rewards": calls.function(
                    lambda prompts, completions, **_: letter_sum(completions), "reward"
                )
            },
        }
        return online_judge(
            model,
            tokenizer,
            PROMPTS,
            folder,
            online_dpo=ONLINE,
            evaluate=calls.function(lambda folder: {"score": 0.5}, "evaluate"),
            **who[kind],
        )

    result = killed_everywhere(loop)
    # 2 steps of 4 prompts: 8 pairs or 16 answers, of which few are equal
    assert 0 < result.metrics[1]["judged"] <= {"judge": 8, "rewards": 16}[kind]
    assert "objective/scores" in result.metrics[1]


@pytest.mark.parametrize(
    "who",
    [
        {},
        {"judge": FakeJudge()},
        {"judge": FakeJudge(), "criteria": "x", "rewards": letter_sum},
        {"rewards": letter_sum, "criteria": "x"},
    ],
)
def test_one_of_judge_and_rewards(model, tokenizer, tmp_path, who) -> None:
    with pytest.raises(ValueError, match="either a judge with its criteria, or rewards"):
        online_judge(model, tokenizer, PROMPTS, tmp_path, **who)
