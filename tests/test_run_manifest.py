"""A checkpoint is resumed by the run that wrote it, and by no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model

from fastpost.run_manifest import MANIFEST, describe_data, describe_model, differences
from fastpost.scoring import FastpostWarning
from tests.trainers.methods import causal_model, preference_rows
from tests.trainers.resumable import build


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPO run of four steps with a checkpoint at the second."""
    folder = tmp_path_factory.mktemp("run")
    build("DPO", folder / "DPO", folder, max_steps=2).train()
    return folder


def resume(run: Path, max_steps: int = 2, change: Any = None, **config: Any) -> Any:
    trainer = build("DPO", run / "other", run, max_steps=max_steps, save_strategy="no", **config)
    if change is not None:
        change(trainer)
    trainer.train(resume_from_checkpoint=str(run / "DPO" / "checkpoint-2"))
    return trainer


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"beta": 0.3}, "objective beta: 0.1 in the checkpoint, 0.3 now"),
        ({"loss_type": ["ipo"]}, "objective loss_type: ['sigmoid'] in the checkpoint, ['ipo'] now"),
        ({"max_length": 50}, "data sha256"),
        ({"seed": 8}, "objective seed: 7 in the checkpoint, 8 now"),
        ({"weight_decay": 0.1}, "objective weight_decay: 0.0 in the checkpoint, 0.1 now"),
        (
            {"gradient_accumulation_steps": 2},
            "objective rows_per_step: 4 in the checkpoint, 8 now",
        ),
    ],
    ids=["beta", "loss", "length", "seed", "decay", "batch"],
)
def test_another_objective_is_refused(config: dict[str, Any], line: str, run: Path) -> None:
    with pytest.raises(ValueError) as error:
        resume(run, **config)
    assert "belongs to another run" in str(error.value)
    if "max_length" in config:
        line = "objective max_length: 1024 in the checkpoint, 50 now"
    assert f"\n  {line}" in str(error.value)


def test_every_difference_is_listed(run: Path) -> None:
    with pytest.raises(ValueError) as error:
        resume(run, beta=0.3, seed=8, ld_alpha=0.5)
    listed = [line for line in str(error.value).splitlines() if line.startswith("  objective ")]
    assert [line.split()[1] for line in listed] == ["beta:", "ld_alpha:", "seed:"]


def test_other_data_is_refused(run: Path) -> None:
    def change(trainer: Any) -> None:
        rows = trainer.train_dataset.to_list()
        rows[3]["chosen_ids"][1] += 1
        trainer.train_dataset = Dataset.from_list(rows)

    with pytest.raises(ValueError, match="data sha256"):
        resume(run, change=change)


def test_another_reference_is_refused(run: Path) -> None:
    """A trainer made from the trained weights would take them for the reference as well."""

    def change(trainer: Any) -> None:
        trainer.ref_model = causal_model(seed=3)

    with pytest.raises(ValueError, match="reference sha256"):
        resume(run, change=change)


def test_differences_within_a_value_are_told_alone() -> None:
    before = {"objective": {"adapters": {"default": {"r": 4, "target_modules": ["q", "v"]}}}}
    now = {"objective": {"adapters": {"default": {"r": 8, "target_modules": ["q", "v"]}, "b": {}}}}
    assert differences(before, now) == (
        [
            "objective adapters.b: absent in the checkpoint, {} now",
            "objective adapters.default.r: 4 in the checkpoint, 8 now",
        ],
        [],
    )


@pytest.mark.parametrize(
    ("one", "other", "line"),
    [
        ({}, {"num_hidden_layers": 3}, "model config.num_hidden_layers: 2 in the checkpoint, 3"),
        ({}, {"seed": 1}, "model frozen_sample"),
        ({}, {"dtype": torch.bfloat16}, None),
    ],
    ids=["architecture", "weights", "precision"],
)
def test_another_base_is_another_model(
    one: dict[str, Any], other: dict[str, Any], line: str | None
) -> None:
    def describe(dtype: torch.dtype = torch.float32, **config: Any) -> dict[str, Any]:
        model = get_peft_model(causal_model(**config).to(dtype), LoraConfig(r=4))
        return {"model": describe_model(model, is_first=True)}

    forbidding, _ = differences(describe(**one), describe(**other))
    assert [found.startswith(str(line)) for found in forbidding[:1]] == ([True] if line else [])


def test_what_only_the_first_process_can_say_is_not_compared() -> None:
    model = get_peft_model(causal_model(), LoraConfig(r=4))
    first, other = ({"model": describe_model(model, is_first=first)} for first in (True, False))
    assert first["model"]["frozen_sample"] and differences(first, other) == ([], [])


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"max_steps": 4}, "schedule max_steps: 2 in the checkpoint, 4 now"),
        ({"learning_rate": 1e-3}, "learning_rate: 0.0003 in the checkpoint, 0.001 now (the check"),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            "schedule gradient_accumulation_steps",
        ),
    ],
    ids=["steps", "rate", "layout"],
)
def test_another_schedule_is_warned_of(config: dict[str, Any], field: str, run: Path) -> None:
    with pytest.warns(FastpostWarning) as warned:
        resume(run, **config)
    assert any(field in str(warning.message) for warning in warned)


@pytest.mark.filterwarnings("error::fastpost.scoring.FastpostWarning")
@pytest.mark.parametrize("config", [{}, {"logging_steps": 1, "memory_budget_gb": 0.01}])
def test_the_same_run_resumes_without_a_word(config: dict[str, Any], run: Path) -> None:
    assert resume(run, **config).state.global_step == 2


def test_checkpoints_of_other_trainers_are_taken_with_a_warning(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for file in (run / "DPO" / "checkpoint-2").iterdir():
        if not file.name.startswith("fastpost_"):
            (folder / file.name).write_bytes(file.read_bytes())
    trainer = build("DPO", tmp_path / "other", run, max_steps=3)
    with pytest.warns(FastpostWarning) as warned:
        trainer.train(resume_from_checkpoint=str(folder))
    told = " ".join(str(warning.message) for warning in warned)
    assert "does not say what it was trained for" in told and "not exactly where" in told


def test_the_manifest_is_plain_json(run: Path) -> None:
    manifest = json.loads((run / "DPO" / "checkpoint-2" / MANIFEST).read_text())
    assert manifest.keys() == {
        "objective",
        "data",
        "reference",
        "model",
        "schedule",
        "versions",
    }
    assert manifest["data"]["rows"] == 12 and len(manifest["reference"]["sha256"]) == 64
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or manifest["versions"]
    assert "output_dir" not in str(manifest) and "0x" not in str(manifest)


def test_the_digest_is_of_content(tmp_path: Path) -> None:
    rows = preference_rows()
    digest = describe_data(rows)["sha256"]
    rows.save_to_disk(tmp_path / "rows", num_shards=3)
    assert describe_data(load_from_disk(tmp_path / "rows"))["sha256"] == digest
    shuffled = rows.select(list(range(11, -1, -1)))
    assert describe_data(shuffled)["sha256"] != digest
    assert describe_data(shuffled.select(list(range(11, -1, -1))))["sha256"] == digest
    # Where one row ends and the next begins is content.
    one, other = ({"ids": [[1, 2], [3]]}, {"ids": [[1], [2, 3]]})
    assert describe_data(Dataset.from_dict(one)) != describe_data(Dataset.from_dict(other))
    with_logps = rows.add_column("ref_logps", [0.0] * 12)
    assert describe_data(with_logps)["sha256"] == digest


def test_what_cannot_be_known_is_not_compared() -> None:
    assert describe_data(preference_rows().to_iterable_dataset())["sha256"] is None
    assert describe_data([1, 2]) == {"rows": 2, "sha256": None}
    known = {"data": {"rows": 2, "sha256": "a"}}
    assert differences(known, {"data": {"rows": 2, "sha256": None}}) == ([], [])
    assert differences(known, {"data": {"rows": 3, "sha256": None}})[0] != []


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    """Its weights would fit, and be scaled otherwise."""
    trainer = build("SFT-dropout", tmp_path / "run", tmp_path, max_steps=2)
    trainer.train()
    trainer.model.peft_config["default"].lora_alpha = 16
    with pytest.raises(
        ValueError, match=r"objective adapters\.default\.lora_alpha: 8 in the checkpoint, 16 now"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_another_reward_function_is_refused(tmp_path: Path) -> None:
    trainer = build("GRPO", tmp_path / "run", tmp_path, max_steps=2)
    trainer.train()
    trainer.reward_func_names = ["another"]
    with pytest.raises(
        ValueError, match=r"reward_funcs: \[.+\] in the checkpoint, \['another'\] now"
    ):
        trainer.train(resume_from_checkpoint=True)
