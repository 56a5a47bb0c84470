"""SPIN: its pairs, its reference, when it stops, and that a kill costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpost.loops.run import LoopRun
from fastpost.loops.spin import spin
from fastpost.trainers.dpo import DPOTrainer
from tests.loops.conftest import TRAINING, Calls, rows_of, same_weights, user, weights

ROWS = [
    {"prompt": user(f"{i} + {i}?"), "completion": [{"role": "assistant", "content": str(2 * i)}]}
    for i in range(5)
]


def reply(model: str, conversation: list, seed: int) -> str | None:
    """Right for 0 and 1, nothing for 4, else an answer that tells which model gave it."""
    number = int(conversation[-1]["content"].split()[0])
    return {0: "0", 1: " 2 ", 4: None}.get(number, f"{model} says {number}")


def run_spin(model, tokenizer, folder, scores, calls=None, **options):
    """`scores` are the evaluations in order."""
    left = iter(scores)
    settings = {"dpo": TRAINING, "max_iterations": 4, "batch_size": 8} | options
    return spin(
        model,
        tokenizer,
        ROWS,
        folder,
        sampler=(calls or Calls()).sampler(reply),
        evaluate=lambda folder: {"score": next(left)},
        metric="score",
        **settings,
    )


def test_each_iteration_plays_against_the_one_before(
    model, tokenizer, tmp_path, monkeypatch
) -> None:
    begun: list[tuple[str, str]] = []
    constructor = DPOTrainer.__init__

    def watched(self, model, *args, **kwargs):
        constructor(self, model, *args, **kwargs)
        begun.append((Path(model).parts[-2:], self.ref_model.state_dict()))

    monkeypatch.setattr(DPOTrainer, "__init__", watched)
    result = run_spin(model, tokenizer, tmp_path, [0.1, 0.2, 0.3], max_iterations=2)
    for iteration, opponent in ((1, "start"), (2, "1-spin/model")):
        assert rows_of(result.rows[f"{iteration}-spin"]) == [
            {
                "prompt": ROWS[i]["prompt"],
                "chosen": ROWS[i]["completion"],
                "rejected": [{"role": "assistant", "content": f"{opponent} says {i}"}],
            }
            for i in (2, 3)
        ]
        folder, reference = begun[iteration - 1]
        assert "/".join(folder).endswith(opponent)
        for name, weight in weights(tmp_path / opponent).items():
            assert weight.equal(reference[name])
    assert [m.get("equal") for m in result.metrics] == [None, 2, 2]
    assert result.metrics[-1]["stopped"] == "max_iterations=2"
    assert result.checkpoint == tmp_path / "2-spin/model"
    assert not same_weights(result.checkpoint, tmp_path / "1-spin/model")


@pytest.mark.parametrize(
    ("scores", "options", "iterations", "best"),
    [
        ([0.1, 0.3, 0.3], {}, 2, "1-spin/model"),
        ([0.1, 0.3, 0.35], {"min_gain": 0.1}, 2, "2-spin/model"),
        ([0.1, 0.3, 0.2, 0.4, 0.5], {"patience": 2}, 4, "4-spin/model"),
        ([0.5, 0.2], {}, 1, "start"),
    ],
)
def test_it_stops_on_a_plateau_and_gives_the_best(
    model, tokenizer, tmp_path, monkeypatch, scores, options, iterations, best
) -> None:
    def no_training(self, stage, *args, **kwargs):
        self.journal.put(f"{stage}/trained", {})
        return self.folder / stage / "model"

    monkeypatch.setattr(LoopRun, "train", no_training)
    result = run_spin(model, tokenizer, tmp_path, scores, **options)
    assert len(result.metrics) == iterations + 1
    assert result.checkpoint == tmp_path / best
    assert ("has not risen" in result.metrics[-1]["stopped"]) == (iterations < 4)


def test_it_stops_where_the_answers_are_the_data(model, tokenizer, tmp_path) -> None:
    def says_the_data(model, conversation, seed):
        return str(2 * int(conversation[-1]["content"].split()[0]))

    result = spin(
        model,
        tokenizer,
        ROWS,
        tmp_path,
        sampler=Calls().sampler(says_the_data),
        evaluate=lambda folder: {"score": 1.0},
        metric="score",
    )
    assert result.metrics[-1] == {
        "iteration": 1,
        "pairs": 0,
        "equal": 5,
        "stopped": "the opponent's answers are the data's",
    }
    assert result.checkpoint == tmp_path / "start" and not result.rows


def test_a_kill_at_any_point_costs_nothing(model, tokenizer, killed_everywhere) -> None:
    def loop(calls: Calls, folder):
        score = calls.function(lambda folder: {"score": float(len(Path(folder).name))}, "evaluate")
        return spin(
            model,
            tokenizer,
            ROWS,
            folder,
            sampler=calls.sampler(reply),
            evaluate=score,
            metric="score",
            patience=2,
            max_iterations=2,
            dpo=TRAINING,
            batch_size=3,
        )

    killed_everywhere(loop)


def test_a_reference_of_ones_own_is_refused(model, tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="previous iterate"):
        run_spin(model, tokenizer, tmp_path, [], dpo={"reference": "frozen"})
