"""A sharded run goes on from its checkpoints, in as many processes exactly, in others nearly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastpost.checkpoints import block_scales, sharded
from fastpost.checkpoints.block_scales import fill_scales, has_same_blocks
from fastpost.checkpoints.sharded import (
    contents_of,
    load_model,
    load_optimizer,
    save_shards,
    write_about,
)
from fastpost_kernels._dynamic_map import num_blocks
from tests.checkpoints.comparison import all_differences, contents
from tests.checkpoints.forked import Server
from tests.trainers.methods import causal_model
from tests.trainers.resumable import build

OPTIMIZER = "optimizer/"
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    # Rows of the embeddings are cut within a block of the optimizer's, or are not.
    "8-bit": {"optimizer": "adamw_8bit", "dtype": "bfloat16"},
    "8-bit-even": {"optimizer": "adamw_8bit", "dtype": "bfloat16", "vocabulary": 264},
    "lora": {"adapter": "lora", "prefix_sharing": False},
    "nf4-dora": {"adapter": "dora", "in_4_bits": True},
    "in-backward": {"optimizer_in_backward": True},
    "grpo": {"method": "GRPO", "beta": 0.1, "steps_per_generation": 2},
}
# A case is run whole once, in a folder of its name; others begin from copies.
FAST = ("full",)


@pytest.fixture(scope="module")
def whole_run(server: Server, runs: Path) -> Any:
    """The folder of a case run to its end by two processes."""

    def run(case: str, processes: int = 2) -> Path:
        folder = runs / f"{case}-{processes}"
        if not folder.exists():
            done = server.run("train", processes, folder=folder, **CASES[case])
            assert done == [0] * processes, server.errors()
        return folder

    return run


def begun(whole: Path, name: str) -> Path:
    """A run folder with checkpoint 2 of `whole` in it."""
    folder = whole.parent / f"{whole.name}-{name}"
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
    return folder


@pytest.mark.parametrize(
    "case",
    [
        case if case in FAST else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
        if case != "8-bit-even"
    ],
)
def test_resumed_run_is_the_run_left_alone(case: str, server: Server, whole_run: Any) -> None:
    whole = whole_run(case)
    folder = begun(whole, "resumed")
    assert server.run("train", 2, folder=folder, resume=True, **CASES[case]) == [0, 0], (
        server.errors()
    )
    assert all_differences(whole / "checkpoint-4", folder / "checkpoint-4") == []
    assert all_differences(whole / "checkpoint-2", whole / "checkpoint-4") != []
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())


def log_of(folder: Path, step: int = 4) -> list[dict[str, float]]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(
    ("before", "now", "case"),
    [
        (2, 1, "full"),
        pytest.param(1, 2, "full", marks=pytest.mark.slow),
        pytest.param(2, 1, "lora", marks=pytest.mark.slow),
        pytest.param(2, 1, "8-bit-even", marks=pytest.mark.slow),
        pytest.param(1, 2, "8-bit-even", marks=pytest.mark.slow),
    ],
)
def test_other_numbers_of_processes_read_the_same_state(
    before: int, now: int, case: str, server: Server, whole_run: Any
) -> None:
    """Weights and optimizer are the saved ones bit for bit; from then on the same rows in each
    step, whose sums are rounded in another order."""
    whole = whole_run(case, before)
    folder = begun(whole, f"to-{now}")
    checkpoint, options = folder / "checkpoint-2", CASES[case]
    done = server.run("load_only", now, folder=folder, checkpoint=checkpoint, **options)
    assert done == [0] * now, server.errors()
    loaded = torch.load(folder / "state.pt")
    saved = contents(whole / "checkpoint-2")
    assert any(name.startswith(OPTIMIZER) for name in saved) and len(saved) > 50
    for name, tensor in saved.items():
        if "/absmax" in name:  # [shards, blocks]
            assert loaded[name].shape[0] == now and tensor.shape[0] == before
            loaded[name], tensor = (t[t != 0] for t in (loaded[name], tensor))
        assert torch.equal(loaded[name], tensor), name
    assert {int(t) for name, t in loaded.items() if name.endswith("/step")} == {2}

    if case != "full":  # masks of dropout, and stochastic rounding, are drawn otherwise
        return
    assert server.run("train", now, folder=folder, resume=True, **options) == [0] * now
    for mine, theirs in zip(log_of(folder), log_of(whole), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["learning_rate"] == theirs["learning_rate"]
        assert mine["num_tokens"] == theirs["num_tokens"]
    mine, theirs = contents(folder / "checkpoint-4"), contents(whole / "checkpoint-4")
    moved = contents(whole / "checkpoint-2")
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    assert any((moved[name] - tensor).abs().max() > 1e-4 for name, tensor in theirs.items())


@pytest.mark.slow
def test_replicas_go_on_in_one_process(server: Server, runs: Path) -> None:
    """Of a run that does not shard: the same rows, and the loss since the last line is the mean."""
    options = {"is_sharded": False, "logging_steps": 3}
    whole, folder = runs / "replicas", runs / "replicas-to-1"
    assert server.run("train", 2, folder=whole, **options) == [0, 0], server.errors()
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
    assert server.run("train", 1, folder=folder, resume=True, **options) == [0], server.errors()
    (mine,), (theirs,) = log_of(folder), log_of(whole)
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    one, other = (load_file(f / "checkpoint-4" / "model.safetensors") for f in (folder, whole))
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_a_run_that_does_not_shard_goes_on_from_shards(server: Server, whole_run: Any) -> None:
    """Of adapters: on one GPU what eight have begun."""
    whole = whole_run("lora")
    folder = begun(whole, "unsharded")
    options = CASES["lora"] | {"is_sharded": False}
    checkpoint = folder / "checkpoint-2"
    done = server.run("load_only", 1, folder=folder, checkpoint=checkpoint, **options)
    assert done == [0], server.errors()
    loaded = torch.load(folder / "state.pt")
    for name, tensor in contents(whole / "checkpoint-2").items():
        assert torch.equal(loaded[name], tensor), name
    assert server.run("train", 1, folder=folder, resume=True, **options) == [0], server.errors()
    assert (folder / "checkpoint-4" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(server: Server, runs: Path) -> None:
    folder = runs / "best"
    assert server.run("load_best", 2, folder=folder, max_steps=3) == [0, 0], server.errors()
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    loaded = torch.load(folder / "state.pt")
    for name, tensor in contents(folder / "checkpoint-1").items():
        assert name.startswith(OPTIMIZER) or torch.equal(loaded[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "has_shards"),
    [
        ({"save_only_model": True}, False),
        ({"save_only_model": True, "at_loading": True}, False),
        ({"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}, True),
    ],
    ids=["only-model", "only-model-at-loading", "whole-weights-too"],
)
def test_whole_weights_are_written_where_asked_for(
    options: dict[str, Any], has_shards: bool, server: Server, runs: Path
) -> None:
    folder = runs / f"whole-weights-{'-'.join(options)}"
    done = server.run("train", 2, folder=folder, max_steps=2, **options)
    assert done == [0, 0], server.errors()
    checkpoint = folder / "checkpoint-2"
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()) and (checkpoint / "shards").exists() == has_shards
    if has_shards:
        weights = model.state_dict()
        for name, tensor in contents(checkpoint).items():
            assert name.startswith(OPTIMIZER) or torch.equal(weights[name], tensor), name


def test_training_goes_on_while_a_checkpoint_is_written(server: Server, runs: Path) -> None:
    folder = runs / "meanwhile"
    assert server.run("train_while_saving", 2, folder=folder) == [0, 0], server.errors()
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_what_was_not_sharded_is_refused_where_it_would_be(server: Server, runs: Path) -> None:
    folder = runs / "plain"
    options = {"folder": folder, "max_steps": 2}
    assert server.run("train", 1, is_sharded=False, **options) == [0], server.errors()
    assert server.run("train", 2, resume=True, **options) == [1, 1]
    assert "is of a model that was not sharded, this run shards (FSDP2)" in server.errors()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("save_on_each_node", True, "the shards of a checkpoint must lie together"),
        ("push_to_hub", True, "set hub_strategy='end'"),
    ],
)
def test_checkpoints_that_a_sharded_run_cannot_have(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    trainer = build("SFT", tmp_path / "run", tmp_path)
    setattr(trainer.args, field, value)
    trainer._refuse_unsavable()
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=message):
        trainer._refuse_unsavable()


@pytest.mark.parametrize(
    ("case", "held"), [("GRPO", "rollouts"), ("SFT-by-length", "an order of rows")]
)
def test_what_belongs_to_other_processes_is_refused(
    case: str, held: str, tmp_path: Path, monkeypatch: Any
) -> None:
    trainer = build(case, tmp_path / "run", tmp_path, max_steps=1, save_steps=1)
    trainer.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    trainer._check_processes(checkpoint)
    monkeypatch.setattr("fastpost.trainers.sharded_checkpoints.num_processes", lambda folder: 2)
    with pytest.raises(ValueError, match=rf"by 2 processes, this run has 1\. It holds {held}"):
        trainer._check_processes(checkpoint)


def test_adapters_that_are_no_part_of_the_model_are_refused() -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="cannot be written shard by shard; use LoRA"):
        contents_of(get_peft_model(causal_model(), config))


@pytest.mark.slow
def test_what_fails_in_the_background_ends_the_run(server: Server, runs: Path) -> None:
    folder = runs / "failing"
    assert server.run("train_on_failing_disk", 2, folder=folder, save_steps=1) == [1, 1]
    assert "the disk of this test failed" in server.errors()
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-1"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("file_bytes", [1000, 2**30], ids=["file-a-tensor", "one-file"])
def test_what_is_saved_is_what_there_was(
    file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors may change once `save_shards` has returned."""
    monkeypatch.setattr(sharded, "_FILE_BYTES", file_bytes)
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 200)
    model.register_buffer("scalar", torch.tensor(3.0))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saving = save_shards(tmp_path, contents_of(model), model, optimizer, None)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    saving.result()
    assert (len(list((tmp_path / "shards").iterdir())) > 1) == (file_bytes == 1000)
    write_about(tmp_path, contents_of(model), model, optimizer)
    load_model(tmp_path, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(
        ValueError, match=r"weight: \[200, 300\] float32 in the checkpoint, .*10, 3"
    ):
        load_model(tmp_path, torch.nn.Linear(3, 10))
    with pytest.raises(ValueError, match="holds the states of AdamW, this run has SGD"):
        load_optimizer(tmp_path, model, torch.optim.SGD(model.parameters()))
    halves = [{"params": [parameter]} for parameter in model.parameters()]
    with pytest.raises(
        ValueError, match=r"groups were of \[2\] parameters, now they are of \[1, 1\]"
    ):
        load_optimizer(tmp_path, model, torch.optim.AdamW(halves))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "processes", "changed", "message"),
    [
        ("8-bit", 1, {}, "this run has 1. It holds 8-bit states of a weight [259, 64]"),
        ("full", 2, {"optimizer": "adamw_8bit"}, "objective optimizer: None in the checkpoint"),
        ("full", 2, {"rows": 8}, "objective rows_per_step: 4 in the checkpoint, 8 now"),
        ("full", 2, {"adapter": "lora"}, "objective adapters.default: absent in the checkpoint"),
    ],
    ids=["processes", "optimizer", "rows", "adapter"],
)
def test_what_cannot_go_on_is_refused_before_it_is_read(
    case: str,
    processes: int,
    changed: dict[str, Any],
    message: str,
    server: Server,
    whole_run: Any,
) -> None:
    folder = begun(whole_run(case), f"refused-{'-'.join(changed)}")
    options = CASES[case] | changed
    done = server.run("train", processes, folder=folder, resume=True, **options)
    assert done == [1] * processes
    assert message in server.errors()
    assert [p.name for p in folder.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(("rows", "width"), [(264, 64), (9, 1024), (3, 512), (8192, 1)])
@pytest.mark.parametrize(("before", "now"), [(1, 4), (4, 1), (2, 3), (8, 2)])
def test_scales_are_cut_as_the_optimizer_cuts_them(
    rows: int, width: int, before: int, now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against `adamw_8bit`'s own count of blocks of each chunk."""
    parameter = torch.empty(rows, width)
    blocks = torch.arange(1.0, 1 + num_blocks(parameter.numel()))

    def cut(shards: int) -> list[torch.Tensor]:
        counts = [num_blocks(part.numel()) for part in parameter.chunk(shards)]
        return list(blocks.split(counts)) if sum(counts) == len(blocks) else []

    pieces = cut(before)
    aligned = {n: has_same_blocks(parameter.shape, n) for n in (before, now)}
    for count, is_aligned in aligned.items():
        starts = [part.storage_offset() for part in parameter.chunk(count)]
        assert is_aligned == all(start % 256 == 0 for start in starts)
    saved = torch.zeros(before, max((len(p) for p in pieces), default=1))
    for row, piece in zip(saved, pieces, strict=False):
        row[: len(piece)] = piece
    for index in range(now):
        monkeypatch.setattr(block_scales, "_shard_of", lambda _, index=index: (now, index))
        scales = torch.full((max((len(p) for p in cut(now)), default=1),), 7.0)
        if not all(aligned.values()):
            with pytest.raises(ValueError, match="other blocks of 256"):
                fill_scales(scales, saved, parameter)
            continue
        fill_scales(scales, saved, parameter)
        wanted = cut(now)[index] if index < len(cut(now)) else scales[:0]
        assert torch.equal(scales[: len(wanted)], wanted) and not scales[len(wanted) :].any()
