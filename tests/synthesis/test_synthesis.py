"""Rows of each method, what filters drop, and runs that are killed at every call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpost.chat_model.cache import CachedChatModel
from fastpost.chat_model.interface import Reply
from fastpost.data.rows import DataError
from fastpost.judges.panel import Panel
from fastpost.synthesis.filters import Filters, JudgeFilter
from fastpost.synthesis.magpie import magpie
from fastpost.synthesis.provenance import has_its_hash, sub_seed
from fastpost.synthesis.rejection import estimate_rejection, sample_and_reject
from fastpost.synthesis.teacher import estimate_teacher, teach
from tests.judges.fake_judges import grader
from tests.synthesis.fake_teacher import FakeTeacher, Killed

TOPICS = ["tides", "bread", "chess"]
PROMPTS = [{"prompt": f"number {i}", "solution": i} for i in range(4)]
WORDS_ALONE = Filters(near_duplicates=None)


def vowels(prompts: Any, completions: Any, solution: Any, **_: Any) -> list[float | None]:
    return [float(sum(text.count(v) for v in "ae")) for text in completions]


METHODS: dict[str, Callable[..., Any]] = {
    "magpie": lambda model, **kw: magpie(model, 5, turns=2, **kw),
    "teacher": lambda model, **kw: teach(model, TOPICS, per_topic=2, **kw),
    "reject": lambda model, **kw: sample_and_reject(
        model, PROMPTS, vowels, samples=3, keep=2, threshold=12, **kw
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_rows_say_where_they_come_from(method: str) -> None:
    rows, report = METHODS[method](FakeTeacher(), seed=3)
    assert report.kept == len(rows) > 2
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (2 if method == "magpie" else 1)
        assert all(m["content"] == m["content"].strip() != "" for m in row["messages"])
        source = row["provenance"]
        assert source["model"] == "fake" and source["sampling"] == {"temperature": 1.0}
        assert isinstance(source["seed"], int) and source["prompt_source"] and source["method"]
        assert has_its_hash(row)
        changed = row | {"messages": [*row["messages"][:-1], {"role": "assistant", "content": ""}]}
        assert not has_its_hash(changed)
        assert not has_its_hash(row | {"provenance": source | {"seed": 1}})
    again, _ = METHODS[method](FakeTeacher(), seed=3)
    other, _ = METHODS[method](FakeTeacher(), seed=4)
    assert again == rows and other != rows


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_every_call_loses_no_row_and_repeats_none(
    method: str, tmp_path: Path
) -> None:
    whole = FakeTeacher()
    expected, _ = METHODS[method](whole)
    assert len(set(whole.calls)) == len(whole.calls) > 8
    for killed_at in range(len(whole.calls)):
        folder = tmp_path / str(killed_at)
        first, second = FakeTeacher(killed_at), FakeTeacher()
        with pytest.raises(Killed):
            METHODS[method](CachedChatModel(first, folder))
        rows, _ = METHODS[method](CachedChatModel(second, folder))
        assert rows == expected
        assert sorted(first.calls + second.calls) == sorted(whole.calls)


def test_a_run_killed_again_and_again_ends(tmp_path: Path) -> None:
    """Each start is given one more reply."""
    calls, deaths = [], 0
    while True:
        model = FakeTeacher(killed_at=1)
        try:
            rows, _ = METHODS["teacher"](CachedChatModel(model, tmp_path))
            break
        except Killed:
            deaths += 1
        finally:
            calls += model.calls
    whole = FakeTeacher()
    assert rows == METHODS["teacher"](whole)[0]
    assert sorted(calls) == sorted(whole.calls) and deaths == len(whole.calls) - 1


def test_magpie_keeps_the_system_message_and_its_turns() -> None:
    rows, report = magpie(FakeTeacher(), 4, system="Speak of birds.", turns=3)
    assert [m["role"] for m in rows[0]["messages"]] == ["system", *["user", "assistant"] * 3]
    assert rows[0]["messages"][0]["content"] == "Speak of birds." and report.asked == 4
    questions = {row["messages"][1]["content"] for row in rows}
    assert len(questions) == 4  # samples of one header are told apart by their seeds
    with pytest.raises(TypeError, match="cannot continue the header"):
        magpie(lambda conversations, *, seed: [], 1)
    with pytest.raises(ValueError, match="turns is 0"):
        magpie(FakeTeacher(), 1, turns=0)


def answering(text: str | None, is_whole: bool = True) -> FakeTeacher:
    """Says one thing in answer to everything but the request for questions."""
    lists = FakeTeacher()

    def say(asked: str, seed: int) -> Reply | None:
        if asked.startswith("Write "):
            return next(lists.stream([[{"role": "user", "content": asked}]], seed=seed))[1]
        return None if text is None else Reply(text, is_whole)

    return FakeTeacher(say=say)


@pytest.mark.parametrize(
    ("model", "filters", "why"),
    [
        (answering("I'm sorry, I cannot help with that."), Filters(), "refusal"),
        (answering("  \n"), Filters(), "empty assistant turn"),
        (answering("No way."), Filters(min_words=3), "answer below 3 words"),
        (answering("one two three four"), Filters(max_words=3), "answer above 3 words"),
        (
            answering("Сегодня хорошая погода, и мы пойдём гулять в парк."),
            Filters(languages=("en",)),
            "language ru",
        ),
        (answering("half an", False), Filters(), "answer cut off at max_tokens"),
    ],
)
def test_each_filter_drops_and_says_why(model: FakeTeacher, filters: Filters, why: str) -> None:
    rows, report = teach(model, TOPICS, per_topic=1, filters=filters)
    assert rows == [] and report.dropped == {why: 3} and f"3 dropped, {why}" in str(report)


@pytest.mark.parametrize(
    ("text", "filters"),
    [
        ("I'm sorry, I cannot help with that.", Filters(drop_refusals=False)),
        ("one two three", Filters(min_words=3, max_words=3)),
        ("Сегодня хорошая погода, и мы пойдём гулять в парк.", Filters(languages=("en", "ru"))),
        ("42", Filters(languages=("en",))),
    ],
)
def test_filters_keep_what_is_within_them(text: str, filters: Filters) -> None:
    prompt = {"prompt": "это вопрос"}
    rows, _ = sample_and_reject(
        answering(text), [prompt], lambda **_: [1.0], samples=1, threshold=1, filters=filters
    )
    assert [row["messages"][1]["content"] for row in rows] == [text]


def test_no_reply_is_counted_and_asked_again(tmp_path: Path) -> None:
    rows, report = teach(CachedChatModel(answering(None), tmp_path), TOPICS, per_topic=1)
    assert rows == [] and report.missing == 3 and "asks them again" in str(report)
    model = FakeTeacher()
    rows, report = teach(CachedChatModel(model, tmp_path), TOPICS, per_topic=1)
    assert len(rows) == 3 and len(model.calls) == 3 and report.missing == 0


def test_repeated_prompts_are_answered_once() -> None:
    long = "please write a short story about a dog that finds its way home through the snow"
    questions = [long, long.upper() + "!", long + " tonight", "What is bread?"]

    def say(asked: str, seed: int) -> Reply:
        if asked.startswith("Write "):
            quoted = ", ".join(f'"{q}"' for q in questions)
            return Reply(f'{{"questions": [{quoted}]}}')
        return Reply("An answer.")

    model = FakeTeacher(say=say)
    rows, report = teach(model, ["x"], per_topic=4)
    assert [row["messages"][0]["content"] for row in rows] == [long, "What is bread?"]
    assert report.dropped == {"repeated prompt": 1, "nearly repeated prompt": 1}
    assert len(model.calls) == 3
    rows, _ = teach(FakeTeacher(say=say), ["x"], per_topic=4, filters=WORDS_ALONE)
    assert len(rows) == 3


def test_a_teacher_that_lies_about_the_form_is_asked_again() -> None:
    def say(asked: str, seed: int) -> Reply:
        if not asked.startswith("Write "):
            return Reply("An answer.")
        if seed == sub_seed(0, "teacher", 1) and "bread" in asked:
            return Reply('```json\n{"questions": ["What is rye?"]}\n```')
        return Reply("1. What is rye?\n2. ...")

    model = FakeTeacher(say=say)
    rows, report = teach(model, ["bread", "chess"], per_topic=1)
    assert [row["messages"][0]["content"] for row in rows] == ["What is rye?"]
    assert rows[0]["provenance"]["prompt_source"] == "topics#0: bread"
    assert report.dropped == {"topic without a list of questions": 1}
    assert len(model.calls) == 2 + 2 + 1 + 1  # both, both, chess a third time, one answer


def test_rejection_keeps_the_best_that_are_accepted() -> None:
    seen: list[Any] = []
    samples = iter(["a", "d", "b", "a", "c", "B!", "b", "b"])
    model = FakeTeacher(say=lambda text, seed: Reply(next(samples)))
    reward_of = {"a": 1.0, "b": 2.0, "c": None, "d": 0.2, "B!": 2.0}
    rows, report = sample_and_reject(
        model,
        PROMPTS[:2],
        lambda prompts, completions, **columns: (
            seen.append(columns["solution"]) or [reward_of[text] for text in completions]
        ),
        samples=4,
        keep=2,
        threshold=0.5,
        filters=Filters(),
        source="p.jsonl",
    )
    # Prompt 0: a, b, c, b; prompt 1: d, a, B!, b.
    kept = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
    assert kept == [("number 0", "b"), ("number 0", "a"), ("number 1", "B!"), ("number 1", "a")]
    assert [row["provenance"]["reward"] for row in rows] == [2.0, 1.0, 2.0, 1.0]
    assert rows[2]["provenance"]["prompt_source"] == "p.jsonl#1"
    assert report.dropped == {"reward below 0.5": 1, "no reward": 1, "repeated answer": 2}
    assert "2 of 2 prompts have an accepted answer" in str(report)
    assert seen == [[0, 1]] * 4


def test_rewards_are_called_as_in_training() -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        assert set(columns) == {"level"}
        return [1.0] * len(prompts)

    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    rows = [{"prompt": "text", "level": 1}, {"prompt": turns, "level": 2, "messages": []}]
    model = FakeTeacher(say=lambda text, seed: Reply("An answer."))
    kept, _ = sample_and_reject(model, rows, reward, samples=1, threshold=1)
    assert seen == [
        ("text", "An answer."),
        (turns, [{"role": "assistant", "content": "An answer."}]),
    ]
    assert kept[1]["messages"] == [*turns, {"role": "assistant", "content": "An answer."}]


def test_judges_drop_what_they_grade_low() -> None:
    judges = [grader(lambda text: 9 if "a" in text.split()[0] else 2, name=n) for n in "xyz"]
    filters = Filters(judge=JudgeFilter(Panel(judges), "sense", 0.5))
    rows, report = teach(FakeTeacher(), TOPICS, per_topic=3, filters=filters)
    dropped = report.dropped["judged below 0.5"]
    assert rows and dropped and len(rows) + dropped == 9
    assert all("a" in row["messages"][1]["content"].split()[0] for row in rows)
    assert "judges: x: weight 0.33" in str(report)
    silent = [grader(lambda text: None, name=n, attempts=1) for n in "xyz"]
    filters = Filters(judge=JudgeFilter(Panel(silent), "sense", 0.5))
    rows, report = teach(FakeTeacher(), ["bread"], per_topic=1, filters=filters)
    assert rows == [] and report.dropped == {"no judge answered": 1}


def test_estimates_bound_the_calls() -> None:
    for estimate, method in [
        (estimate_teacher(FakeTeacher(), TOPICS, per_topic=2), "teacher"),
        (estimate_rejection(FakeTeacher(), PROMPTS, samples=3), "reject"),
    ]:
        model = FakeTeacher()
        METHODS[method](model)
        assert model.calls and len(model.calls) <= estimate.calls


@pytest.mark.parametrize(
    ("make", "error", "complaint"),
    [
        (lambda: teach(FakeTeacher(), [], per_topic=1), ValueError, "no topics"),
        (lambda: teach(FakeTeacher(), ["a", " "], per_topic=1), ValueError, "topic 1"),
        (lambda: teach(FakeTeacher(), ["a"], per_topic=0), ValueError, "per_topic is 0"),
        (lambda: teach(lambda c, *, seed: [], ["a"], per_topic=1), TypeError, "no `identity`"),
        (lambda: Filters(min_words=3, max_words=2), ValueError, "leave no length"),
        (lambda: Filters(languages="en"), ValueError, "tuple"),
        (lambda: Filters(near_duplicates=0.0), ValueError, "near_duplicates is 0.0"),
        (lambda: JudgeFilter(None, "c", 0), ValueError, "min_score is 0"),
        (
            lambda: sample_and_reject(FakeTeacher(), [{"text": "a"}], vowels, threshold=0),
            DataError,
            r"row 0 .*\['text'\]",
        ),
        (
            lambda: sample_and_reject(FakeTeacher(), PROMPTS, vowels, threshold=0, samples=0),
            ValueError,
            "samples is 0",
        ),
        (
            lambda: sample_and_reject(FakeTeacher(), PROMPTS, lambda **_: [1.0], threshold=0),
            ValueError,
            "1 values for 4 answers",
        ),
    ],
)
def test_mistakes_are_named(make: Any, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        make()
