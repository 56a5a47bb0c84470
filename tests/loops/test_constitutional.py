"""Constitutional AI against the same steps in plain words, and kills."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastpost.loops.constitution import Constitution
from fastpost.loops.constitutional import constitutional
from tests.loops.conftest import TRAINING, Calls, rows_of, user
from tests.trainers.methods import letter_sum

FILE = """
principles:
  - {name: kind, critique: what is unkind, revise: be kind, prefer: the kinder}
  - {name: short, critique: what is long, revise: be short, prefer: the shorter}
"""
PROMPTS = [{"prompt": user(f"insult {i}")} for i in range(6)]


@pytest.fixture
def constitution(tmp_path) -> Constitution:
    path = tmp_path / "constitution.yaml"
    path.write_text(FILE)
    return Constitution.from_yaml(path)


def reply(model: str, conversation: list, seed: int) -> str | None:
    """Every reply tells what it replied to; one prompt is never answered, one never criticised."""
    last, first = conversation[-1]["content"], conversation[0]["content"]
    if first == "insult 1" or (first == "insult 2" and last.startswith("what is")):
        return None
    if model != "start":  # answers that are compared; of one prompt both are equal
        return "same" if first == "insult 3" else f"{first[-1]}{seed % 9973}"
    return f"({len(conversation)}: {last})"


class FakeJudge:
    """The higher letter sum wins; ties and abstains on two prompts."""

    def __init__(self, call=lambda **asked: None) -> None:
        self._call = call

    def prefer(self, criteria, prompts, firsts, seconds):
        self._call(criteria=criteria, prompts=prompts, firsts=firsts, seconds=seconds)
        values = [
            float(a > b) for a, b in zip(letter_sum(firsts), letter_sum(seconds), strict=True)
        ]
        special = {"insult 4": 0.5, "insult 5": None}
        values = [special.get(p, v) for p, v in zip(prompts, values, strict=True)]
        return SimpleNamespace(values=values, single_judged=[p == "insult 0" for p in prompts])


def plain_revision(constitution: Constitution, i: int, revisions: int) -> tuple[str, list[str]]:
    """What becomes of prompt i: the last revision, and the principles on the way."""
    answer, names = f"(1: insult {i})", []
    for revision in range(1, revisions + 1):
        principle = constitution.draw(0, "revise", revision, i)
        # conversations of 3 and 5 turns: each reply tells their length and last turn
        answer = f"(5: {principle.revise})"
        names.append(principle.name)
    return answer, names


@pytest.mark.parametrize("revisions", [1, 2])
def test_rows_are_those_of_the_plain_loop(
    model, tokenizer, constitution, tmp_path, revisions
) -> None:
    conversations, judged, drawn = [], [], {}

    def watched(name, conversation, seed):
        text = reply(name, conversation, seed)
        conversations.append((name, conversation))
        if name != "start":
            drawn.setdefault(conversation[0]["content"], []).append(text)
        return text

    result = constitutional(
        model,
        tokenizer,
        PROMPTS,
        constitution,
        FakeJudge(lambda **asked: judged.append(asked)),
        tmp_path / "run",
        sampler=Calls().sampler(watched),
        revisions=revisions,
        sft=TRAINING,
        dpo=TRAINING,
    )
    kept = (0, 3, 4, 5)
    assert rows_of(result.rows["1-sft"]) == [
        {
            "prompt": user(f"insult {i}"),
            "completion": [{"role": "assistant", "content": answer}],
            "principles": names,
        }
        for i in kept
        for answer, names in [plain_revision(constitution, i, revisions)]
    ]
    # the whole conversation of a first critique and revision
    principle = constitution.draw(0, "revise", 1, 0)
    critique = [
        *user("insult 0"),
        {"role": "assistant", "content": "(1: insult 0)"},
        {"role": "user", "content": principle.critique},
    ]
    revise = [
        *critique,
        {"role": "assistant", "content": f"(3: {principle.critique})"},
        {"role": "user", "content": principle.revise},
    ]
    assert ("start", critique) in conversations and ("start", revise) in conversations

    by_prompt = {
        prompt: (asked["criteria"], first, second)
        for asked in judged
        for prompt, first, second in zip(
            asked["prompts"], asked["firsts"], asked["seconds"], strict=True
        )
    }
    assert by_prompt == {
        f"insult {i}": (constitution.draw(0, "prefer", i).prefer, *drawn[f"insult {i}"])
        for i in (0, 2, 4, 5)
    }
    expected = []
    for i in (0, 2):
        _, *texts = by_prompt[f"insult {i}"]
        worse, better = sorted(texts, key=lambda text: letter_sum([text])[0])
        expected.append(
            {
                "prompt": user(f"insult {i}"),
                "chosen": [{"role": "assistant", "content": better}],
                "rejected": [{"role": "assistant", "content": worse}],
                "principle": constitution.draw(0, "prefer", i).name,
                "single_judged": i == 0,
            }
        )
    assert rows_of(result.rows["2-dpo"]) == expected
    counts = {"rows": 2, "lost": 2, "ties": 1, "unjudged": 1, "single_judged": 1}
    assert {name: result.metrics[2][name] for name in counts} == counts
    assert (result.metrics[1]["rows"], result.metrics[1]["lost"]) == (4, 2)


@pytest.mark.parametrize(
    "feedback",
    ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "ppo"))],
)
def test_a_kill_at_any_point_costs_nothing(
    model, tokenizer, constitution, killed_everywhere, feedback
) -> None:
    group = {"num_generations": 2, "max_completion_length": 6, "temperature": 1.0}
    fields = {
        "dpo": {"dpo": TRAINING},
        "grpo": {"reward": TRAINING, "rl": TRAINING | group},
        "ppo": {"reward": TRAINING, "rl": TRAINING | group},
    }

    def loop(calls: Calls, folder):
        return constitutional(
            model,
            tokenizer,
            PROMPTS,
            constitution,
            FakeJudge(calls.function(dict, "judge")),
            folder,
            sampler=calls.sampler(reply),
            feedback=feedback,
            sft=TRAINING,
            evaluate=calls.function(lambda folder: {"score": 0.5}, "evaluate"),
            **fields[feedback],
        )

    result = killed_everywhere(loop)
    last = {"dpo": "2-dpo", "grpo": "3-grpo", "ppo": "3-ppo"}[feedback]
    assert result.checkpoint.parts[-2:] == (last, "model")


def test_principles_are_drawn_alike_and_all_are(constitution) -> None:
    drawn = [constitution.draw(1, "revise", 1, i).name for i in range(40)]
    assert drawn == [constitution.draw(1, "revise", 1, i).name for i in range(40)]
    assert set(drawn) == {"kind", "short"}
    assert drawn != [constitution.draw(2, "revise", 1, i).name for i in range(40)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected the one key 'principles'"),
        ("principles: []", "a list of at least one"),
        ("principles: [{name: a}]", r"principle 1: expected name, critique, .* got \['name'\]"),
        (FILE.replace("short, c", "kind, c"), "two principles have one name"),
        (FILE.replace("be short", "''"), "principle 2: revise must be a text"),
        ("principles: [", "cannot be read as a constitution"),
    ],
)
def test_a_malformed_constitution_is_named(tmp_path, text, message) -> None:
    path = tmp_path / "constitution.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Constitution.from_yaml(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revisions": 0}, "give at least 1"),
        ({"feedback": "kto"}, "one of dpo, grpo, ppo"),
        ({"rl": {}}, "does not use rl"),
        ({"feedback": "grpo", "dpo": {}}, "does not use dpo"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    model, tokenizer, constitution, tmp_path, options, message
) -> None:
    with pytest.raises(ValueError, match=message):
        constitutional(
            model,
            tokenizer,
            PROMPTS,
            constitution,
            FakeJudge(),
            tmp_path,
            sampler=Calls().sampler(reply),
            **options,
        )
