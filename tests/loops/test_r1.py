"""The R1 recipe: what each stage begins with and learns from, mixed rewards, and kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpost.loops.r1 import _Only, r1
from fastpost.trainers.grpo import GRPOTrainer
from fastpost.trainers.sft import SFTTrainer
from tests.loops.conftest import TRAINING, Calls, rows_of, user
from tests.trainers.methods import letter_sum

COLD = [{"prompt": user(f"think {i}"), "completion": f"so {i}"} for i in range(3)]
PROBLEMS = [{"prompt": user(f"solve {i}"), "solution": str(i)} for i in range(4)]
GENERAL_ROWS = [{"prompt": user("hello"), "completion": "hi"}]
GENERAL = [{"prompt": user(f"chat {i}"), "tone": "kind"} for i in range(2)]
GROUP = TRAINING | {"num_generations": 2, "max_completion_length": 6}


def reply(model: str, conversation: list, seed: int) -> str | None:
    number = conversation[-1]["content"].split()[-1]
    return f"it is {number}" if (seed + int(number)) % 3 else f"maybe {number}"


def solves(prompts, completions, solution, **_):
    return [
        float(c[0]["content"] == f"it is {s}") + letter_sum([c])[0] / 1000
        for c, s in zip(completions, solution, strict=True)
    ]


def is_kind(prompts, completions, tone, **_):
    assert set(tone) == {"kind"}
    return letter_sum(completions)


def run_r1(model, tokenizer, folder, calls, rewards=solves, **options):
    settings = {"general_rows": GENERAL_ROWS, "general_prompts": GENERAL} | options
    return r1(
        model,
        tokenizer,
        COLD,
        PROBLEMS,
        rewards,
        folder,
        sampler=calls.sampler(reply),
        threshold=1.0,
        samples=2,
        sft=TRAINING,
        grpo=GROUP,
        **{"general_rewards": is_kind} | settings,
    )


def test_stages_begin_where_the_paper_begins_them(model, tokenizer, tmp_path, monkeypatch) -> None:
    begun = []
    for trainer_class in (SFTTrainer, GRPOTrainer):

        def watched(self, model, *args, constructor=trainer_class.__init__, **kwargs):
            constructor(self, model, *args, **kwargs)
            begun.append((type(self).__name__, "/".join(Path(model).parts[-2:])))

        monkeypatch.setattr(trainer_class, "__init__", watched)
    authors = set()

    def named(name, conversation, seed):
        authors.add(name)
        return reply(name, conversation, seed)

    calls = Calls()
    calls.sampler = lambda _, sampler=calls.sampler: sampler(named)
    result = run_r1(model, tokenizer, tmp_path / "run", calls)
    assert begun == [
        ("SFTTrainer", "run/start"),
        ("GRPOTrainer", "1-cold-start/model"),
        ("SFTTrainer", "run/start"),
        ("GRPOTrainer", "3-rejection-sampling/model"),
    ]
    assert authors == {"2-reasoning-rl/model"}
    assert [entry["stage"] for entry in result.metrics] == ["start", *result.rows]
    texts = {
        row["prompt"][0]["content"]: row["completion"][0]["content"]
        for row in rows_of(result.rows["3-rejection-sampling"])
    }
    assert texts.pop("hello") == "hi"
    assert texts and texts == {p: f"it is {p[-1]}" for p in texts}
    assert result.metrics[3]["kept"] == len(texts)
    assert rows_of(result.rows["4-mixed-rl"]) == [
        *({**row, "kind": "reasoning", "tone": None} for row in PROBLEMS),
        *(
            {"prompt": row["prompt"], "solution": None, "kind": "general", "tone": "kind"}
            for row in GENERAL
        ),
    ]
    named_rewards = {key for key in result.metrics[4] if key.endswith("/mean")}
    assert {"rewards/reasoning_solves/mean", "rewards/general_is_kind/mean"} <= named_rewards


def test_a_reward_speaks_of_its_own_kind_alone() -> None:
    asked = []

    def reward(prompts, completions, kept, state):
        asked.append((prompts, completions, kept, state))
        return [1.0, None]

    only = _Only("general", reward)
    said = only(
        prompts=["a", "b", "c"],
        completions=["x", "y", "z"],
        kind=["general", "reasoning", "general"],
        kept=[1, 2, 3],
        state="whole",
    )
    assert said == [1.0, None, None]
    assert asked == [(["a", "c"], ["x", "z"], [1, 3], "whole")]
    assert only(prompts=["a"], completions=["x"], kind=["reasoning"]) == [None]


def test_general_prompts_need_rewards(model, tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="go together"):
        run_r1(model, tokenizer, tmp_path, Calls(), general_rewards=None)


@pytest.mark.slow
def test_a_kill_at_any_point_costs_nothing(model, tokenizer, killed_everywhere) -> None:
    def loop(calls: Calls, folder):
        return run_r1(
            model,
            tokenizer,
            folder,
            calls,
            evaluate=calls.function(lambda folder: {"score": 0.5}, "evaluate"),
        )

    killed_everywhere(loop)
