"""What a pipeline's file says, and what it cannot say."""

from __future__ import annotations

from typing import Any

import pytest

from fastpost.cli.main import main
from fastpost.cli.run import bundled_recipes, read_pipeline
from fastpost.loops import LOOPS
from fastpost.pipeline.recipe import LOOP_KINDS, RecipeError
from tests.pipeline.conftest import read

SFT = {"stage": "sft", "dataset": "rows.jsonl"}
DPO = {"stage": "dpo", "dataset": "pairs.jsonl", "lora_r": 4}


def test_each_stage_goes_on_from_the_last_model() -> None:
    found = read(
        {"stage": "mix", "name": "rows", "sources": {"a": "a.jsonl"}},
        {**SFT, "dataset": "stage:rows"},
        {"stage": "reward", "dataset": "pairs.jsonl"},
        DPO,
        {"stage": "merge"},
        {"stage": "safety", "dataset": "refusals.jsonl", "ref_model": "stage:sft"},
        {"stage": "export"},
    )
    models = {stage.name: stage.fields.get("model") for stage in found.stages}
    assert models == {
        "rows": None,
        "sft": "org/model",
        "reward": "stage:sft",
        "dpo": "stage:sft",
        "merge": "stage:sft",  # onto what the adapter was trained on
        "safety": "stage:merge",
        "export": "stage:safety",
    }
    assert found.stage("merge").fields["adapter"] == "stage:dpo"
    assert found.stage("safety").method == "dpo"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"stage": "stf", "dataset": "x"}], "there is no stage 'stf'. Did you mean 'sft'"),
        ([SFT, SFT], "the name 'sft' is taken"),
        ([{**SFT, "dataset": "stage:rows"}], "stage:rows is no stage before this one"),
        ([SFT, {**DPO, "dataset": "stage:sft"}], "dataset: stage:sft makes a model"),
        ([DPO, {**SFT}], "makes an adapter; put `- {stage: merge}`"),
        ([SFT, {"stage": "merge"}], "is no stage with an adapter"),
        ([{**SFT, "output_dir": "x"}], "the pipeline's own"),
        ([{**SFT, "plan": {"row": 3}}], "unknown 'row'. Did you mean 'rows'"),
        ([{**SFT, "evaluate": True}], "there is no `evaluation`"),
        ([{**SFT, "name": "../x"}], "letters, digits"),
        ([{"stage": "safety", "dataset": "x", "method": "ppo"}], "method: dpo or sft"),
    ],
)
def test_mistakes_are_named(stages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(RecipeError, match=f".*{said.split('`')[0]}"):
        read(*stages)


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        ({"scorer": "judg", "tolerance": 0}, "one of reasoning_gym"),
        ({"scorer": "reasoning_gym", "task": "chain_sum"}, "tolerance"),
        ({"scorer": "reasoning_gym", "tolerance": 0.1}, "task is missing"),
        ({"scorer": "lm_eval", "tasks": ["a"], "tolerance": 0, "limits": 3}, "mean 'limit'"),
    ],
)
def test_scorers_are_checked(scorer: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read(SFT, evaluation=[scorer])


def test_loops_have_the_names_of_the_loops() -> None:
    assert set(LOOP_KINDS) == set(LOOPS)


def test_bundled_recipes_are_right_field_by_field() -> None:
    names = bundled_recipes()
    assert {"assistant-32b.yaml", "sft-70b.yaml", "qlora-70b.yaml"} <= set(names)
    for name in names:
        assert read_pipeline(name).stages


def test_single_recipes_are_the_stages_of_the_whole() -> None:
    whole = read_pipeline("assistant-32b")
    for name, kind in (
        ("sft-32b", "sft"),
        ("dpo-32b", "dpo"),
        ("safety-32b", "safety"),
        ("grpo-32b", "grpo"),
    ):
        alone = read_pipeline(name).stage(kind)
        apart = {"dataset", "model", "trial_step"}
        for field in set(alone.fields) | set(whole.stage(kind).fields):
            if field not in apart:
                assert alone.fields[field] == whole.stage(kind).fields[field], (name, field)
        assert alone.plan == whole.stage(kind).plan


def recipe(tmp_path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: org/model\noutput_dir: {tmp_path}/run\nstages:\n{text}")
    return str(path)


def test_a_misspelt_field_of_the_last_stage_stops_before_the_first(tmp_path, capsys) -> None:
    path = recipe(
        tmp_path,
        "  - {stage: sft, dataset: a.jsonl}\n"
        "  - {stage: dpo, dataset: b.jsonl, learning_rat: 1e-6}\n",
    )
    assert main(["run", path]) == 2
    said = capsys.readouterr().err
    assert "stage dpo: fastpost dpo has no field 'learning_rat'. Did you mean" in said
    assert not (tmp_path / "run").exists()


def test_values_are_converted_as_the_command_converts_them(tmp_path, capsys) -> None:
    path = recipe(tmp_path, "  - {stage: sft, dataset: a.jsonl, learning_rate: 1e-5}\n")
    assert read_pipeline(path).stage("sft").fields["learning_rate"] == 1e-5
    path = recipe(tmp_path, "  - {stage: sft, dataset: a.jsonl, max_steps: many}\n")
    assert main(["run", path]) == 2
    assert "max_steps: expected integer" in capsys.readouterr().err


def test_a_loop_is_checked_against_its_arguments(tmp_path, capsys) -> None:
    path = recipe(tmp_path, "  - {stage: rejection_sampling, prompts: a.jsonl, rewards: maths}\n")
    assert main(["run", path]) == 2
    assert "missing: sampler, threshold" in capsys.readouterr().err
