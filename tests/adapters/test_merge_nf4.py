"""Adapters merged into 4-bit weights: right bytes, readable by both sides, errors as stated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpost.adapters.load_nf4 import load_nf4
from fastpost.adapters.merge_nf4 import merge_adapter_nf4
from fastpost.adapters.nf4_layer import Nf4Linear
from fastpost.adapters.nf4_state import unpack_state
from fastpost.adapters.weight_files import WeightFolder
from fastpost.cli.main import main
from fastpost_kernels import nf4_dequantize, nf4_quantize
from tests.adapters.test_merge import IDS, PROMPTS, save_adapter, save_base
from tests.trainers.conftest import tiny_model
from tests.trainers.methods import tokenizer

FP32 = torch.float32
UP = "model.layers.0.mlp.up_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"  # without an adapter
ANY = {"prompts": PROMPTS, "max_kl": 100.0}


def four_bit(folder: Path, name: str) -> Tensor:
    files = WeightFolder(folder)
    return nf4_dequantize(unpack_state(name, files.read(name), files.read), FP32)


def rounded(weight: Tensor) -> Tensor:
    return nf4_dequantize(nf4_quantize(weight), FP32)


def up_delta(adapter: Path) -> Tensor:
    found = load_file(adapter / "adapter_model.safetensors")
    a, b = (found[f"base_model.model.{UP[:-7]}.lora_{m}.weight"] for m in "AB")
    return 2 * b @ a


def bytes_of(tensor: Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()  # as bf16 some are NaN


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("base_is", ["original", "nf4"])
@pytest.mark.parametrize("shards", ["one file", "many"])
def test_is_the_merged_weight_rounded_once(tmp_path, base_is: str, shards: str) -> None:
    base = save_base(
        tmp_path / "base", **({} if shards == "one file" else {"max_shard_size": "40KB"})
    )
    adapter = save_adapter(tmp_path / "adapter", base)
    report = merge_adapter_nf4(base, adapter, tmp_path / "out", base=base_is, **ANY)
    exact = WeightFolder(base)
    seen = exact.read(UP) if base_is == "original" else rounded(exact.read(UP))
    torch.testing.assert_close(four_bit(tmp_path / "out", UP), rounded(seen + up_delta(adapter)))
    assert torch.equal(four_bit(tmp_path / "out", K), rounded(exact.read(K)))
    norm = "model.norm.weight"
    assert torch.equal(WeightFolder(tmp_path / "out").read(norm), exact.read(norm))
    model = load_nf4(tmp_path / "out", dtype=FP32, device="cpu")
    assert len([m for m in model.modules() if isinstance(m, Nf4Linear)]) == 14
    assert len(WeightFolder(tmp_path / "out").shards) == len(exact.shards)
    assert (len(exact.shards) > 3) == (shards == "many")
    assert report.layers == 6 and 0 < report.mean_kl <= report.max_kl


def test_the_errors_are_those_of_their_definition(tmp_path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, use_dora=True, target_modules=["up_proj"])
    report = merge_adapter_nf4(base, adapter, tmp_path / "out", base="nf4", **ANY)
    files, merged, moved, deltas = WeightFolder(base), [], [], []
    found = load_file(adapter / "adapter_model.safetensors")
    for layer in (0, 1):
        name = UP.replace("0", str(layer))
        stem = f"base_model.model.{name[:-7]}.lora_"
        a, b = (found[f"{stem}{m}.weight"] for m in "AB")
        seen = rounded(files.read(name))
        wide = seen + 2 * b @ a
        merged.append(wide * (found[f"{stem}magnitude_vector"] / wide.norm(dim=1))[:, None])
        deltas.append(merged[-1] - seen)
        moved.append(four_bit(tmp_path / "out", name) - seen)
    m, d, q = (torch.stack(parts).double() for parts in (merged, deltas, moved))
    (kind,) = report.kinds
    assert kind[:2] == ("up_proj", 2) and report.layers == 2
    lost = q - d
    expected = (lost.norm() / m.norm(), lost.norm() / d.norm(), (q * d).sum() / d.square().sum())
    torch.testing.assert_close(kind[2:], tuple(map(float, expected)), rtol=1e-4, atol=1e-6)
    assert 0.02 < kind.weight_error < 0.15


def test_a_small_adapter_is_lost_on_the_grid_and_noisy_beside_it(tmp_path) -> None:
    """Onto the 4-bit weights it rounds back to nothing; from 16 bits it survives in the mean."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, scale=0.01)
    lost, noisy = (
        merge_adapter_nf4(base, adapter, tmp_path / base_is, base=base_is, **ANY)
        for base_is in ("nf4", "original")
    )
    assert all(abs(kind.delta_kept) < 0.1 and kind.delta_error > 0.9 for kind in lost.kinds)
    assert all(0.8 < kind.delta_kept < 1.2 and kind.delta_error > 2 for kind in noisy.kinds)
    assert lost.mean_kl > 0.9 * lost.unadapted_kl  # no nearer than the base alone


def test_loads_in_transformers_with_bitsandbytes(tmp_path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base", max_shard_size="40KB")
    adapter = save_adapter(tmp_path / "adapter", base)
    merge_adapter_nf4(base, adapter, tmp_path / "out", **ANY)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=FP32)
    ours = load_nf4(tmp_path / "out", dtype=FP32, device="cpu")
    layers = [(n, m) for n, m in stock.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    for name, layer in layers:
        dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(dense, ours.get_submodule(name).dequantize()), name
    assert len(layers) == 14 and type(stock.lm_head) is torch.nn.Linear
    # its CPU kernel for inference multiplies in bf16
    torch.testing.assert_close(logits(stock), logits(ours), rtol=0.02, atol=0.2)


def test_a_base_in_4_bits_keeps_its_bytes_and_blocks(tmp_path) -> None:
    base = save_base(tmp_path / "base")
    packed = tmp_path / "packed"
    options = {"block_size": 32, "double_quant": False, "storage": torch.bfloat16}
    load_nf4(base, dtype=FP32, device="cpu", **options).save_pretrained(packed)
    for path in base.glob("*token*"):
        (packed / path.name).write_bytes(path.read_bytes())
    adapter = save_adapter(tmp_path / "adapter", base)
    merge_adapter_nf4(packed, adapter, tmp_path / "out", **ANY)
    before, after = (load_file(f / "model.safetensors") for f in (packed, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if bytes_of(before[name]) != bytes_of(after[name])}
    assert UP in changed and not any(name.startswith(K) for name in changed)
    weight = nf4_quantize(
        four_bit(packed, UP) + up_delta(adapter), block_size=32, double_quant=False
    )
    torch.testing.assert_close(four_bit(tmp_path / "out", UP), nf4_dequantize(weight, FP32))
    assert after[UP].dtype == torch.bfloat16
    configs = [json.loads((f / "config.json").read_text()) for f in (packed, tmp_path / "out")]
    assert configs[0] == configs[1]


def test_a_head_stays_in_16_bits_and_is_merged_there(tmp_path) -> None:
    base = tmp_path / "base"
    tiny_model(len(tokenizer()), tie_word_embeddings=False).save_pretrained(base)
    tokenizer().save_pretrained(base)
    targets = ["lm_head", "up_proj"]
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=targets)
    file = adapter / "adapter_model.safetensors"
    found = {k: v for k, v in load_file(file).items() if "base_layer" not in k}  # PEFT adds it
    save_file(found, file)
    report = merge_adapter_nf4(base, adapter, tmp_path / "out", **ANY)
    assert report.layers == 3 and [kind.kind for kind in report.kinds] == ["up_proj"]
    a, b = (found[f"base_model.model.lm_head.lora_{m}.weight"] for m in "AB")
    expected = WeightFolder(base).read("lm_head.weight") + 2 * b @ a
    torch.testing.assert_close(WeightFolder(tmp_path / "out").read("lm_head.weight"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]


def test_refuses(tmp_path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    with pytest.raises(ValueError, match=r"(?s)up_proj .* delta kept .*is above 1e-09.*16 bits"):
        merge_adapter_nf4(base, adapter, tmp_path / "out", prompts=PROMPTS, max_kl=1e-9)
    with pytest.raises(ValueError, match="prompts is empty"):
        merge_adapter_nf4(base, adapter, tmp_path / "out", prompts=[])
    with pytest.raises(ValueError, match="base must be one of"):
        merge_adapter_nf4(base, adapter, tmp_path / "out", prompts=PROMPTS, base="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_from_the_command_line(tmp_path, capsys) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    command = ["merge", "adapter", str(base), str(adapter), str(tmp_path / "out"), "--into", "nf4"]
    assert main([*command, "--max-kl", "1e-9"]) == 2
    assert "delta error" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--base", "nf4", "--max-kl", "9"]) == 0
    assert "merged 6 layers into NF4; KL from the adapter" in capsys.readouterr().out


_PEAK = """
import sys
from pathlib import Path
from transformers import AutoConfig
import torch
from fastpost.adapters.merge import read_deltas
from fastpost.adapters.merge_nf4 import Writer
from fastpost.adapters.weight_files import WeightFolder, write_several
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10
def write(base, adapter, out):
    weights, config = WeightFolder(base), AutoConfig.from_pretrained(base)
    Path(out).mkdir()
    writer = Writer(weights, read_deltas(adapter), config, torch.float32, False)
    write_several(weights, Path(out), writer.made)
write(*sys.argv[1:3], sys.argv[2] + "/small")  # what is imported on the way
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
write(*sys.argv[3:5], sys.argv[4] + "/large")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_writing_takes_the_memory_of_a_shard(tmp_path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    size = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16}
    large = tmp_path / "large"
    tiny_model(512, **size).save_pretrained(large, max_shard_size="15MB")
    large_adapter = save_adapter(tmp_path / "large_adapter", large)
    files = [path.stat().st_size for path in large.glob("*.safetensors")]
    folders = map(str, (base, adapter, large, large_adapter))
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *folders], capture_output=True, text=True, check=True
    )
    workspace = 44 * 512 * 1024  # of merging and quantising the largest weight
    assert len(files) > 8
    assert int(done.stdout) < max(files) + workspace + (16 << 20) < sum(files) / 2
