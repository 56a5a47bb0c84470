"""Iterated SFT → DPO: each cycle's pairs, the reference that stays, and kills."""

from __future__ import annotations

import pytest

from fastpost.loops.iterated import iterated
from fastpost.trainers.dpo import DPOTrainer
from tests.loops.conftest import TRAINING, Calls, rows_of, user, weights

SFT_ROWS = [{"prompt": user(f"hello {i}"), "completion": f"goodbye {i}"} for i in range(4)]
PROMPTS = [{"prompt": user(f"count to {i}"), "target": i} for i in range(1, 6)]


def reply(model: str, conversation: list, seed: int) -> str | None:
    target = int(conversation[-1]["content"].split()[-1])
    return f"{model} " + "x" * (1 + (seed + target) % 5)


def closeness(prompts, completions, target, **_):
    """How near the number of x comes to the target; no opinion on targets of 5."""
    return [
        None if t == 5 else -abs(c[0]["content"].count("x") - t)
        for c, t in zip(completions, target, strict=True)
    ]


def run_iterated(model, tokenizer, folder, calls, rewards=closeness, **options):
    settings = {"cycles": 2, "samples": 4, "sft": TRAINING, "dpo": TRAINING, "batch_size": 8}
    return iterated(
        model,
        tokenizer,
        SFT_ROWS,
        PROMPTS,
        rewards,
        folder,
        sampler=calls.sampler(reply),
        **settings | options,
    )


def test_pairs_come_from_the_model_of_now_and_the_reference_stays(
    model, tokenizer, tmp_path, monkeypatch
) -> None:
    references = []
    constructor = DPOTrainer.__init__

    def watched(self, *args, **kwargs):
        constructor(self, *args, **kwargs)
        references.append(self.ref_model.state_dict())

    monkeypatch.setattr(DPOTrainer, "__init__", watched)
    seen: dict[str, list[str]] = {}

    def remembered(model, conversation, seed):
        text = reply(model, conversation, seed)
        seen.setdefault(f"{model} {conversation[-1]['content']}", []).append(text)
        return text

    result = iterated(
        model,
        tokenizer,
        SFT_ROWS,
        PROMPTS,
        closeness,
        tmp_path,
        sampler=Calls().sampler(remembered),
        cycles=2,
        prompts_per_cycle=3,
        samples=4,
        sft=TRAINING,
        dpo=TRAINING,
    )
    for cycle, author, targets in ((1, "0-sft/model", (1, 2, 3)), (2, "1-dpo/model", (4, 5, 1))):
        expected = []
        for target in targets:
            texts = seen[f"{author} count to {target}"]
            assert len(texts) == 4
            score = {text: -abs(text.count("x") - target) for text in texts}
            best = max(texts, key=lambda t: score[t])
            worst = min(reversed(list(dict.fromkeys(texts))), key=lambda t: score[t])
            if target != 5 and score[best] > score[worst]:
                expected.append((target, best, worst))
        rows = rows_of(result.rows[f"{cycle}-dpo"])
        assert (
            expected
            and [
                (
                    int(row["prompt"][0]["content"].split()[-1]),
                    row["chosen"][0]["content"],
                    row["rejected"][0]["content"],
                )
                for row in rows
            ]
            == expected
        )
        assert result.metrics[cycle]["pairs"] == len(rows)
    named = str(tmp_path / "0-sft/model")
    assert [entry["reference"] for entry in result.metrics] == [named] * 3
    assert len(references) == 2
    for reference in references:
        for name, weight in weights(named).items():
            assert weight.equal(reference[name])


@pytest.mark.slow
def test_a_kill_at_any_point_costs_nothing(model, tokenizer, killed_everywhere) -> None:
    def loop(calls: Calls, folder):
        result = run_iterated(
            model,
            tokenizer,
            folder,
            calls,
            calls.function(closeness, "reward"),
            samples=2,
            dpo=TRAINING | {"beta": 0.2},
            evaluate=calls.function(lambda folder: {"score": 0.5}, "evaluate"),
        )
        for entry in result.metrics:
            entry["reference"] = entry["reference"].removeprefix(str(folder))
        return result

    killed_everywhere(loop)


def test_cycles_without_a_pair_are_an_error(model, tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="1-dpo has no rows"):
        run_iterated(model, tokenizer, tmp_path, Calls(), min_margin=100.0)
