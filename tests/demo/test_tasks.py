"""The demo's data: right answers score, wrong ones do not, and the exam is never trained on."""

import re

import pytest

from fastpost.demo import tasks

ANSWER = re.compile(r"Answer: -?\d+$")


def question(row):
    return row["prompt"][-1]["content"]


def test_sft_rows_are_conversations_that_end_in_an_answer():
    rows = tasks.sft_rows(50, seed=1)
    assert len({question(row) for row in rows}) == 50
    for row in rows:
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert [message["role"] for message in row["completion"]] == ["assistant"]
        assert ANSWER.search(row["completion"][0]["content"])


def test_all_rows_begin_with_the_same_system_prompt():
    entries = tasks.problems(20, seed=2, held_out=False)
    rows = tasks.sft_rows(20, seed=1) + tasks.preference_rows(entries, ["12345"] * 20)
    assert len({row["prompt"][0]["content"] for row in rows}) == 1


def test_a_worked_solution_scores_in_full():
    for entry in tasks.problems(200, seed=3, held_out=True):
        assert tasks.score(tasks.solution(entry), entry) == 1.0


def test_every_step_of_a_solution_is_true():
    for entry in tasks.problems(200, seed=3, held_out=False):
        *steps, _ = tasks.solution(entry).splitlines()
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)


def test_only_wrong_replies_become_pairs():
    entries = tasks.problems(4, seed=5, held_out=False)
    replies = [tasks.solution(entries[0]), "12 + 5 = 99999\nAnswer: 99999", "  ", "no idea"]
    rows = tasks.preference_rows(entries, replies)
    assert [question(row) for row in rows] == [entries[1]["question"], entries[3]["question"]]
    for entry, reply, row in zip(entries[1::2], replies[1::2], rows, strict=True):
        assert row["rejected"][0]["content"] == reply
        assert tasks.score(row["chosen"][0]["content"], entry) == 1.0
        assert tasks.score(reply, entry) < 1.0


@pytest.mark.parametrize("reply", ["", "I cannot say.", "Answer: "])
def test_a_reply_without_a_number_scores_less(reply):
    (entry,) = tasks.problems(1, seed=6, held_out=True)
    assert tasks.score(reply, entry) < 1.0


def test_a_free_reply_is_marked_by_its_last_number():
    (entry,) = tasks.problems(1, seed=6, held_out=True)
    assert tasks.score(f"Let me see, 1 + 1 = 2. It is {entry['answer']}.", entry) == 1.0
    assert tasks.score(f"It is {entry['answer']}, or rather 12345.", entry) < 1.0


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_held_out_problems_are_never_trained_on(seed):
    held_out = {entry["question"] for entry in tasks.problems(500, seed=seed, held_out=True)}
    # The same seed on purpose: it is the side that keeps them apart.
    trained = {question(row) for row in tasks.sft_rows(2000, seed=seed)}
    trained |= {entry["question"] for entry in tasks.problems(500, seed=seed + 2, held_out=False)}
    assert len(held_out) == 500
    assert not held_out & trained


def test_the_same_seed_gives_the_same_rows():
    assert tasks.sft_rows(20, seed=9) == tasks.sft_rows(20, seed=9)
    assert tasks.sft_rows(20, seed=9) != tasks.sft_rows(20, seed=10)


@pytest.mark.parametrize("n", [0, 100_001])
def test_an_impossible_number_of_problems_is_refused(n):
    with pytest.raises(ValueError, match=f"got {n}"):
        tasks.problems(n, seed=0, held_out=False)
