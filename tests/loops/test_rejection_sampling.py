"""Rejection sampling: which answers are kept, and that nothing is asked twice."""

from __future__ import annotations

import pytest

from fastpost.data.rows import DataError
from fastpost.loops.rejection_sampling import rejection_sampling
from tests.loops.conftest import TRAINING, Calls, rows_of, user

WORDS = ("aa", "bee", "c", "dd", "e")
PROMPTS = [{"prompt": user(f"say {word}"), "answer": word} for word in WORDS]


def reply(model: str, conversation: list, seed: int) -> str | None:
    """Some answers are right, some are wrong, one is missing."""
    word = conversation[-1]["content"].split()[1]
    choice = (seed + len(word)) % 4
    return [word, word * 2, "no", None][choice]


def is_right(prompts, completions, answer, **_):
    """1 for the answer, more for a doubled one; no opinion on "no"."""
    scores = {True: 1.0, False: None}
    return [
        1.5 if c[0]["content"] == a * 2 else scores[c[0]["content"] == a]
        for c, a in zip(completions, answer, strict=True)
    ]


def expected_rows(seeds: list[list[int]], threshold: float, keep: int) -> list[dict]:
    """The loop in plain words: `seeds[k][i]` is the seed of sample k of prompt i."""
    rows = []
    for i, prompt in enumerate(PROMPTS):
        texts = []
        for sample in seeds:
            text = reply("", prompt["prompt"], sample[i])
            if text is not None and text not in texts:
                texts.append(text)
        scores = {"no": None, prompt["answer"]: 1.0, prompt["answer"] * 2: 1.5}
        good = [t for t in texts if scores[t] is not None and scores[t] >= threshold]
        for text in sorted(good, key=lambda t: -scores[t])[:keep]:
            completion = [{"role": "assistant", "content": text}]
            rows.append({"prompt": prompt["prompt"], "completion": completion})
    return rows


@pytest.mark.parametrize(("threshold", "keep"), [(1.0, 1), (1.0, 2), (1.5, 4)])
def test_rows_are_those_of_the_plain_loop(model, tokenizer, tmp_path, threshold, keep) -> None:
    seeds: list[int] = []

    def sampler(folder: str):
        def chat(conversations, *, seed):
            seeds.append(seed)
            return [reply("", conversation, seed) for conversation in conversations]

        return chat

    result = rejection_sampling(
        model,
        tokenizer,
        PROMPTS,
        is_right,
        tmp_path,
        sampler=sampler,
        threshold=threshold,
        keep=keep,
        samples=5,
        sft=TRAINING,
        batch_size=2,
    )
    by_sample = [[seeds[3 * sample + i // 2] for i in range(len(PROMPTS))] for sample in range(5)]
    rows = rows_of(result.rows["1-rejection-sampling"])
    assert rows == expected_rows(by_sample, threshold, keep) and rows
    assert len(set(seeds)) == len(seeds) == 15
    last = result.metrics[-1]
    assert last["kept"] == len(rows)
    assert last["solved"] == len({row["prompt"][0]["content"] for row in rows}) / len(PROMPTS)


def test_a_kill_at_any_point_costs_nothing(model, tokenizer, killed_everywhere) -> None:
    def loop(calls: Calls, folder):
        return rejection_sampling(
            model,
            tokenizer,
            PROMPTS,
            calls.function(is_right, "reward"),
            folder,
            sampler=calls.sampler(reply),
            threshold=1.0,
            samples=3,
            iterations=2,
            sft=TRAINING,
            evaluate=calls.function(lambda folder: {"score": len(folder) * 0 + 1}, "evaluate"),
            batch_size=3,
        )

    result = killed_everywhere(loop)
    assert [entry["iteration"] for entry in result.metrics] == [0, 1, 2]


def test_an_answer_that_never_comes_is_an_error_with_the_fix(model, tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="lower threshold"):
        rejection_sampling(
            model,
            tokenizer,
            PROMPTS,
            is_right,
            tmp_path,
            sampler=Calls().sampler(reply),
            threshold=9.0,
            sft=TRAINING,
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "say a", "answer": "a"}], "row 1: prompt must be a list of messages"),
        ([], "has no rows"),
    ],
)
def test_wrong_prompts_are_named(model, tokenizer, tmp_path, rows, message) -> None:
    with pytest.raises(DataError, match=message):
        rejection_sampling(
            model,
            tokenizer,
            rows,
            is_right,
            tmp_path,
            sampler=Calls().sampler(reply),
            threshold=1.0,
        )
