"""Merged adapters and soups: what PEFT and plain arithmetic give, in files transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpost.adapters.merge import merge_adapter
from fastpost.adapters.soup import greedy_soup, interpolate, task_arithmetic, uniform_soup
from fastpost.adapters.weight_files import WeightFolder
from fastpost.cli.main import main
from fastpost_kernels import nf4_dequantize, nf4_quantize
from tests.trainers.conftest import tiny_model
from tests.trainers.methods import tokenizer

PROMPTS = ("what is 1 + 2?", "think")
IDS = torch.arange(3, 23)[None]


def save_base(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Path:
    model = tiny_model(len(tokenizer()), seed=seed).to(dtype)
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, scale: float = 0.05, **options: Any) -> Path:
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(settings | options))
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
        if "magnitude" in name:
            parameter.data.mul_(1.1)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path, adapter: Path | None = None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}},
    ],
    ids=["lora", "dora", "patterns"],
)
@pytest.mark.parametrize("shards", ["one file", "many"])
def test_says_what_the_adapter_says(tmp_path, shards: str, options) -> None:
    size = {} if shards == "one file" else {"max_shard_size": "40KB"}
    base = save_base(tmp_path / "base", **size)
    adapter = save_adapter(tmp_path / "adapter", base, **options)
    report = merge_adapter(base, adapter, tmp_path / "out", prompts=PROMPTS)
    assert report.layers == 6 and report.max_kl < 1e-5
    torch.testing.assert_close(
        logits(tmp_path / "out"), logits(base, adapter), rtol=1e-4, atol=1e-4
    )
    assert (logits(tmp_path / "out") - logits(base)).abs().max() > 0.1
    files = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert (len([f for f in files if f.endswith(".safetensors")]) > 3) == (shards == "many")


def test_onto_the_four_bit_base(tmp_path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    report = merge_adapter(base, adapter, tmp_path / "out", prompts=PROMPTS, base="nf4")
    assert report.max_kl < 1e-5
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "out"))
    config = load_file(adapter / "adapter_model.safetensors")
    a, b = (config[f"base_model.model.{name[:-7]}.lora_{m}.weight"] for m in "AB")
    expected = nf4_dequantize(nf4_quantize(before[name]), torch.float32) + 2 * b @ a
    torch.testing.assert_close(after[name], expected)
    other = "model.layers.0.self_attn.k_proj.weight"  # without an adapter: left as it is
    assert torch.equal(after[other], before[other])


def test_a_merge_that_loses_the_adapter_is_refused(tmp_path) -> None:
    """An adapter below the rounding of bf16 weights vanishes in them."""
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, scale=0.05)
    with pytest.raises(ValueError, match=r"nats a token.*above 1e-12"):
        merge_adapter(base, adapter, tmp_path / "out", prompts=PROMPTS, max_kl=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert merge_adapter(base, adapter, tmp_path / "out", prompts=PROMPTS).mean_kl < 0.01


def test_refuses_what_does_not_fit(tmp_path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    with pytest.raises(ValueError, match="prompts is empty"):
        merge_adapter(base, adapter, tmp_path / "out", prompts=[])
    with pytest.raises(ValueError, match="base must be one of"):
        merge_adapter(base, adapter, tmp_path / "out", prompts=PROMPTS, base="int8")
    with pytest.raises(ValueError, match="is not empty"):
        merge_adapter(base, adapter, base, prompts=PROMPTS)
    with pytest.raises(ValueError, match=r"has neither model\.safetensors"):
        merge_adapter(adapter, adapter, tmp_path / "out", prompts=PROMPTS)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="only LoRA and DoRA of linear layers"):
        merge_adapter(base, adapter, tmp_path / "out", prompts=PROMPTS)
    save_file({k.replace("layers.0", "layers.7"): v for k, v in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"layers\.7.*belongs to another model"):
        merge_adapter(base, adapter, tmp_path / "out", prompts=PROMPTS)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def models(tmp_path) -> list[Path]:
    return [
        save_base(tmp_path / name, seed, max_shard_size=size)
        for name, seed, size in (("a", 0, "1GB"), ("b", 1, "40KB"), ("c", 2, "60KB"))
    ]


def weights(folder: Path) -> dict[str, Tensor]:
    found = WeightFolder(folder)
    return {name: found.read(name) for name in found.shard_of}


def test_arithmetic_of_models(models, tmp_path) -> None:
    a, b, c = (weights(folder) for folder in models)
    uniform_soup(models, tmp_path / "mean")
    interpolate(models[0], models[1], tmp_path / "line", t=0.25)
    interpolate(models[0], models[1], tmp_path / "arc", t=0.25, spherical=True)
    task_arithmetic(models[0], models[1:], [1.0, -0.5], tmp_path / "task")
    mean, line, arc, task = (weights(tmp_path / f) for f in ("mean", "line", "arc", "task"))
    for name in a:
        torch.testing.assert_close(mean[name], (a[name] + b[name] + c[name]) / 3)
        torch.testing.assert_close(line[name], 0.75 * a[name] + 0.25 * b[name])
        moved = a[name] + (b[name] - a[name]) - 0.5 * (c[name] - a[name])
        torch.testing.assert_close(task[name], moved)
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = a[name].double(), b[name].double()
    angle = torch.arccos((first * second).sum() / (first.norm() * second.norm()))
    expected = ((0.75 * angle).sin() * first + (0.25 * angle).sin() * second) / angle.sin()
    torch.testing.assert_close(arc[name].double(), expected, rtol=1e-5, atol=1e-6)
    # a quarter of a right angle away, where the straight line is too short
    assert arc[name].norm() > 1.1 * line[name].norm()
    norm = "model.norm.weight"  # equal in both: the arc has no plane
    torch.testing.assert_close(arc[norm], a[norm])
    assert torch.isfinite(logits(tmp_path / "arc")).all()


def test_a_greedy_soup_keeps_what_helps(models, tmp_path) -> None:
    """Scores by hand: b is best, c helps it, a does not."""
    folders = [str(folder) for folder in models]
    asked = []

    def evaluate(folder: str) -> float:
        asked.append(folder)
        return {folders[0]: 0.5, folders[1]: 0.9, folders[2]: 0.6}.get(
            folder, 0.95 if len(asked) == 4 else 0.1
        )

    assert greedy_soup(folders, tmp_path / "soup", evaluate) == [folders[1], folders[2]]
    assert len(asked) == 5
    b, c, soup = (weights(folder) for folder in (*models[1:], tmp_path / "soup"))
    for name in b:
        torch.testing.assert_close(soup[name], (b[name] + c[name]) / 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "soup"]


def test_models_of_another_shape_are_refused(models, tmp_path) -> None:
    other = tiny_model(len(tokenizer()), num_hidden_layers=1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not the same architecture"):
        uniform_soup([models[0], tmp_path / "other"], tmp_path / "out")
    with pytest.raises(ValueError, match="at least two"):
        uniform_soup(models[:1], tmp_path / "out")
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        interpolate(*models[:2], tmp_path / "out", t=1.5)
    with pytest.raises(ValueError, match="expected 2 factors"):
        task_arithmetic(models[0], models[1:], [1.0], tmp_path / "out")


def test_from_the_command_line(models, tmp_path, capsys) -> None:
    adapter = save_adapter(tmp_path / "adapter", models[0])
    assert main(["merge", "adapter", str(models[0]), str(adapter), str(tmp_path / "out")]) == 0
    assert "merged 6 layers; KL from the adapter" in capsys.readouterr().out
    arguments = ["merge", "mean", *map(str, models), "--output", str(tmp_path / "mean")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert main(["merge", "--help"]) == 0
    assert main(["merge", "mean"]) == 2
    assert "is not empty" in capsys.readouterr().err
