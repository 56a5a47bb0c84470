"""Each loop teaches: a tiny model trained from scratch, graded on prompts it was never trained on.

The task is to answer three letters with the first of them. The model at the start has learnt to
answer the first or the last, one as often as the other: every loop has something to choose from.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from datasets import Dataset

import fastpost
from fastpost.chat_model.interface import Sampling
from fastpost.loops.constitution import Constitution, Principle
from fastpost.loops.constitutional import constitutional
from fastpost.loops.iterated import iterated
from fastpost.loops.length_control import length_control
from fastpost.loops.online_judge import online_judge
from fastpost.loops.r1 import r1
from fastpost.loops.rejection_sampling import rejection_sampling
from fastpost.loops.samplers import local_sampler
from fastpost.loops.spin import spin
from fastpost.loops.test_time import adapted
from tests.loops.conftest import TRAINING, user
from tests.trainers.methods import causal_model
from tests.trainers.methods import tokenizer as methods_tokenizer

pytestmark = pytest.mark.slow

LETTERS = "abcdefghijkl"
QUICK = TRAINING | {
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 32,
}
REWARD_MODEL = QUICK | {"learning_rate": 3e-3, "max_steps": 60}
DPO = QUICK | {"learning_rate": 1e-3, "max_steps": 12, "beta": 0.1}
GRPO = QUICK | {
    "learning_rate": 1e-3,
    "max_steps": 15,
    "num_generations": 8,
    "max_completion_length": 4,
    "temperature": 1.0,
    "per_device_train_batch_size": 64,
}
SAMPLER = local_sampler(Sampling(temperature=1.0, max_tokens=12), batch_size=128)


def words(count: int, *, held_out: bool) -> list[str]:
    """Different triples of letters; those with a "d" in the middle are never trained on."""
    found = random.Random(held_out)
    triples = ["".join(found.sample(LETTERS, 3)) for _ in range(20 * count)]
    return [w for w in dict.fromkeys(triples) if (w[1] == "d") == held_out][:count]


def prompts(count: int, *, held_out: bool = False) -> list[dict]:
    return [{"prompt": user(word), "word": word} for word in words(count, held_out=held_out)]


HELD_OUT = prompts(100, held_out=True)


def first_letters(prompts, completions, **_) -> list[float]:
    return [
        float(c[-1]["content"] == p[-1]["content"][0])
        for p, c in zip(prompts, completions, strict=True)
    ]


def replies(folder: str) -> list[str]:
    return SAMPLER(folder)([row["prompt"] for row in HELD_OUT], seed=5)


def accuracy(folder: str) -> dict[str, float]:
    right = [text == row["word"][0] for text, row in zip(replies(folder), HELD_OUT, strict=True)]
    return {"accuracy": sum(right) / len(right)}


def trained_from_scratch(folder, answers) -> str:
    """A model that has learnt to give one of `answers(word)`, each as often."""
    draw = random.Random(3)
    rows = [
        {
            "prompt": user(w),
            "completion": [{"role": "assistant", "content": draw.choice(answers(w))}],
        }
        for w in draw.choices(words(1200, held_out=False), k=9600)
    ]
    settings = QUICK | {"max_steps": 300, "learning_rate": 3e-3}
    trainer = fastpost.SFTTrainer(
        causal_model(initializer_range=0.05),
        fastpost.SFTConfig(str(folder / "run"), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=methods_tokenizer(),
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    folder = trained_from_scratch(tmp_path_factory.mktemp("first"), lambda w: [w[0], w[-1]])
    assert 0.3 < accuracy(folder)["accuracy"] < 0.7
    return folder


class FirstLetterJudge:
    """Prefers the answer that is the first letter of the prompt."""

    def prefer(self, criteria, prompts, firsts, seconds):
        sides = zip(prompts, firsts, seconds, strict=True)
        return SimpleNamespace(values=[0.5 + ((a == p[0]) - (b == p[0])) / 2 for p, a, b in sides])


def assert_learnt(result) -> None:
    before, after = result.metrics[0]["accuracy"], result.metrics[-1]["accuracy"]
    print([entry.get("accuracy") for entry in result.metrics])
    assert before < 0.7 and after > 0.85


def test_rejection_sampling(start, tokenizer, tmp_path) -> None:
    result = rejection_sampling(
        start,
        tokenizer,
        prompts(256),
        first_letters,
        tmp_path,
        sampler=SAMPLER,
        threshold=1.0,
        samples=3,
        sft=QUICK | {"learning_rate": 1e-3, "max_steps": 20},
        evaluate=accuracy,
        batch_size=256,
    )
    assert_learnt(result)


def test_spin(start, tokenizer, tmp_path) -> None:
    rows = [row | {"completion": row["word"][0]} for row in prompts(256)]
    result = spin(
        start,
        tokenizer,
        rows,
        tmp_path,
        sampler=SAMPLER,
        dpo=DPO,
        evaluate=accuracy,
        metric="accuracy",
        batch_size=256,
    )
    assert_learnt(SimpleNamespace(metrics=[result.metrics[0], accuracy(str(result.checkpoint))]))
    pairs = [entry["pairs"] for entry in result.metrics[1:]]
    assert pairs[-1] < pairs[0] / 2  # ever fewer answers of the model can be told from the data


def test_iterated(start, tokenizer, tmp_path) -> None:
    result = iterated(
        start,
        tokenizer,
        None,
        prompts(384),
        first_letters,
        tmp_path,
        sampler=SAMPLER,
        cycles=2,
        prompts_per_cycle=192,
        samples=3,
        dpo=DPO,
        evaluate=accuracy,
        batch_size=256,
    )
    assert_learnt(result)


@pytest.mark.parametrize("who", ["judge", "rewards"])
def test_online_judge(start, tokenizer, tmp_path, who) -> None:
    given = {
        "judge": {"judge": FirstLetterJudge(), "criteria": "the first letter"},
        "rewards": {"rewards": first_letters},
    }
    result = online_judge(
        start,
        tokenizer,
        prompts(512),
        tmp_path,
        online_dpo=QUICK
        | {
            "learning_rate": 2e-3,
            "max_steps": 24,
            "max_new_tokens": 4,
            "max_length": 64,
            "temperature": 1.0,
        },
        evaluate=accuracy,
        **given[who],
    )
    assert_learnt(result)


@pytest.mark.parametrize("feedback", ["dpo", "grpo"])
def test_constitutional(start, tokenizer, tmp_path, feedback) -> None:
    """The model responds; its critiques and revisions, beyond it, are played by rule: half help."""
    principle = Principle("first", "Is that the first letter?", "Give the first letter.", "first")

    def sampler(folder: str):
        chat = SAMPLER(folder)

        def talk(conversations, *, seed):
            if len(conversations[0]) == 1:
                return chat(conversations, seed=seed)
            if conversations[0][-1]["content"] == principle.critique:
                return ["It may not be."] * len(conversations)
            says = [(c[0]["content"], c[1]["content"]) for c in conversations]
            return [w[0] if w[1] < "g" else answer for w, answer in says]

        return talk

    fields = {"dpo": {"dpo": DPO}, "grpo": {"reward": REWARD_MODEL, "rl": GRPO | {"max_steps": 25}}}
    result = constitutional(
        start,
        tokenizer,
        prompts(512),
        Constitution((principle,)),
        FirstLetterJudge(),
        tmp_path,
        sampler=sampler,
        feedback=feedback,
        sft=QUICK | {"learning_rate": 5e-4, "max_steps": 8},
        evaluate=accuracy,
        batch_size=256,
        **fields[feedback],
    )
    assert_learnt(result)
    scores = [entry["accuracy"] for entry in result.metrics]
    assert scores[0] < scores[1] < scores[2]


def test_r1(start, tokenizer, tmp_path) -> None:
    result = r1(
        start,
        tokenizer,
        [
            row | {"completion": random.Random(i).choice(row["word"][::2])}
            for i, row in enumerate(prompts(64))
        ],
        prompts(256),
        first_letters,
        tmp_path,
        sampler=SAMPLER,
        threshold=1.0,
        sft=QUICK | {"learning_rate": 3e-4, "max_steps": 4},
        grpo=GRPO | {"max_steps": 6},
        second_sft=QUICK | {"learning_rate": 1e-3, "max_steps": 12},
        evaluate=accuracy,
        batch_size=256,
    )
    assert_learnt(result)
    _, cold, reasoning, rejection, _ = (entry["accuracy"] for entry in result.metrics)
    assert reasoning > cold + 0.1 and rejection > cold + 0.1


def test_test_time_training(start, tokenizer) -> None:
    """A user for whom the last letter is right is served, and the next one finds the start."""
    chat = SAMPLER(start)
    asked = [row["prompt"] for row in HELD_OUT]
    last = [row["word"][-1] for row in HELD_OUT]

    def share() -> float:
        texts = chat(asked, seed=5)
        return sum(t == w for t, w in zip(texts, last, strict=True)) / len(last)

    before = chat(asked, seed=5)
    examples = [row | {"completion": row["word"][-1]} for row in prompts(16)]
    sft = {"bf16": False}
    with adapted(chat.model, tokenizer, examples, steps=10, learning_rate=5e-3, sft=sft):
        assert share() > 0.85
    assert share() < 0.7
    assert chat(asked, seed=5) == before


@pytest.fixture(scope="module")
def wordy(tmp_path_factory) -> str:
    """Answers with the first letter, one to eight times."""
    folder = tmp_path_factory.mktemp("wordy")
    return trained_from_scratch(folder, lambda w: [w[0] * n for n in range(1, 9)])


def test_a_length_reward_brings_lengths_to_the_target(wordy, tokenizer, tmp_path) -> None:
    def starts_right(prompts, completions, **_):
        return [
            float(c[-1]["content"][:1] == p[-1]["content"][0])
            for p, c in zip(prompts, completions, strict=True)
        ]

    result = length_control(
        wordy,
        tokenizer,
        prompts(256),
        HELD_OUT,
        tmp_path,
        way="reward",
        sampler=SAMPLER,
        rewards=starts_right,
        target_tokens=3,
        per_token=0.3,
        training=GRPO | {"max_completion_length": 12, "learning_rate": 5e-4},
        evaluate=lambda folder: {
            "right": sum(
                text[:1] == row["word"][0]
                for text, row in zip(replies(folder), HELD_OUT, strict=True)
            )
            / len(HELD_OUT)
        },
        batch_size=256,
    )
    before, after = result.metrics
    print([(entry["mean_tokens"], entry["right"]) for entry in result.metrics])
    assert before["mean_tokens"] > 3.5 and after["mean_tokens"] < 3
    assert after["right"] > 0.85
