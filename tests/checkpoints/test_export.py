"""An exported checkpoint is loaded by plain transformers and PEFT, and is what was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fastpost.checkpoints import model_files, shard_files
from fastpost.checkpoints.export import export_checkpoint
from fastpost.checkpoints.sharded import contents_of, save_shards, write_about
from fastpost.cli.main import main
from tests.checkpoints.comparison import contents
from tests.checkpoints.forked import Server

IDS = torch.arange(3, 35).view(2, 16)
ONE_STEP = {"max_steps": 1, "save_steps": 1}


@pytest.fixture(scope="module")
def model_run(server: Server, runs: Path) -> Path:
    """A sharded run of a whole model, which also saved it as users do at the end."""
    folder = runs / "model"
    done = server.run("save_model", 2, folder=folder, output=runs / "saved", **ONE_STEP)
    assert done == [0, 0], server.errors()
    return folder


@pytest.fixture(scope="module")
def adapter_run(server: Server, runs: Path) -> Path:
    """Adapters trained on a 4-bit base, both sharded."""
    folder, output = runs / "adapter", runs / "saved-adapter"
    options = {"adapter": "dora", "in_4_bits": True, **ONE_STEP}
    done = server.run("save_model", 2, folder=folder, output=output, **options)
    assert done == [0, 0], server.errors()
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_exported_model_is_the_trained_one(model_run: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint, output = model_run / "checkpoint-1", tmp_path / "out"
    assert main(["export", str(checkpoint), str(output), "--file-gb", "0.0001"]) == 0
    assert "model, 20 tensors, 0.4 MB" in capsys.readouterr().out
    index = json.loads((output / "model.safetensors.index.json").read_text())
    trained = {n: t for n, t in contents(checkpoint).items() if not n.startswith("optimizer/")}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in trained.values())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and files == {file.name for file in output.glob("*.safetensors")}
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()) and type(loaded).__name__ == "LlamaForCausalLM"
    for name, tensor in trained.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # What users save at the end of training is the same.
    saved = AutoModelForCausalLM.from_pretrained(model_run.parent / "saved")
    assert torch.equal(loaded(IDS).logits, saved(IDS).logits)
    assert saved.config.to_dict() | {"_name_or_path": None} == loaded.config.to_dict() | {
        "_name_or_path": None
    }
    started = AutoModelForCausalLM.from_pretrained(model_run.parent / "SFT-policy")
    assert not torch.equal(loaded(IDS).logits, started(IDS).logits)
    assert AutoTokenizer.from_pretrained(output).chat_template
    assert not list(output.glob("*state*")) and not list(output.glob("*.pt"))


def test_exported_adapter_of_a_4_bit_base_loads_in_peft(adapter_run: Path, tmp_path: Path) -> None:
    checkpoint, output = adapter_run / "checkpoint-1", tmp_path / "out"
    assert export_checkpoint(checkpoint, output).adapters == ("default",)
    trained = {n: t for n, t in contents(checkpoint).items() if not n.startswith("optimizer/")}
    assert all("lora" in name for name in trained)
    base = AutoModelForCausalLM.from_pretrained(adapter_run.parent / "SFT-policy")
    model = PeftModel.from_pretrained(base, output)
    loaded = model.state_dict()
    for name, tensor in trained.items():
        assert torch.equal(loaded[name], tensor), name
    assert sum("lora" in name for name in loaded) == len(trained) == 14 * 3
    # What users save at the end of training is the same, byte for byte.
    saved = adapter_run.parent / "saved-adapter"
    names = {"adapter_model.safetensors", "adapter_config.json"}
    assert names <= {path.name for path in output.iterdir()}
    for name in names:
        assert (saved / name).read_bytes() == (output / name).read_bytes()


def test_a_checkpoint_of_adapters_holds_nothing_else(adapter_run: Path) -> None:
    files = [p for p in (adapter_run / "checkpoint-1").rglob("*") if p.is_file()]
    held = contents(adapter_run / "checkpoint-1")
    assert all("lora" in name for name in held)
    base = (adapter_run.parent / "SFT-policy" / "model.safetensors").stat().st_size
    assert sum(t.nbytes for t in held.values()) < base
    assert not any(file.name.startswith("model") for file in files)


def test_host_memory_holds_one_tensor(
    model_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: when a tensor is read, the ones before are gone."""
    alive: list[Any] = []
    most = 0
    stock = shard_files.ShardFiles.read

    def read(self: Any, name: str) -> torch.Tensor:
        nonlocal most
        tensor = stock(self, name)
        assert all(storage.expired() for storage in alive)
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()))
        most = max(most, tensor.nbytes)
        return tensor

    monkeypatch.setattr(shard_files.ShardFiles, "read", read)
    export_checkpoint(model_run / "checkpoint-1", tmp_path / "out")
    assert len(alive) == 20 and most < sum(t.nbytes for t in weights_in(tmp_path / "out").values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_experts_are_exported_as_transformers_loads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.SGD(model.parameters())
    save_shards(tmp_path / "c", contents_of(model), model, optimizer, None).result()
    write_about(tmp_path / "c", contents_of(model), model, optimizer)
    model_files.write_description(tmp_path / "c", model)
    export_checkpoint(tmp_path / "c", tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_the_file_is_what_safetensors_writes(model_run: Path, tmp_path: Path) -> None:
    export_checkpoint(model_run / "checkpoint-1", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = {
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "turned": torch.arange(6.0).view(2, 3).T,
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    described = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    model_files.write_model(tmp_path, described, tensors.__getitem__)
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(
        torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in tensors.items()
    )
    with pytest.raises(ValueError, match="half is"):
        model_files.write_model(tmp_path, {"half": ((2, 3), torch.float32)}, tensors.__getitem__)


@pytest.mark.parametrize("case", ["not sharded", "not empty", "half"])
def test_refusals(case: str, model_run: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint, output = model_run / "checkpoint-1", tmp_path / "out"
    if case == "not sharded":
        checkpoint = model_run.parent / "saved"
    elif case == "not empty":
        output.mkdir()
        (output / "mine.txt").write_text("kept")
    else:
        (output.parent / "_saving" / "out").mkdir(parents=True)
        (output.parent / "_saving" / "out" / "model.safetensors").write_text("half")
    done = main(["export", str(checkpoint), str(output)])
    if case == "half":
        assert done == 0 and len(weights_in(output)) == 20
        assert not (output.parent / "_saving").exists()
    else:
        assert done == 2
        assert f"is {case}" in capsys.readouterr().err.replace("is not a sharded", "is not sharded")
        assert not output.exists() or [p.name for p in output.iterdir()] == ["mine.txt"]


def test_the_command_answers_at_once() -> None:
    code = (
        "import sys; from fastpost.cli.main import main; main(['export', '--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
