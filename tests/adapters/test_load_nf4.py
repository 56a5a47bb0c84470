"""Models loaded in 4 bits: right, without bitsandbytes, and never in memory as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GptOssConfig,
    Qwen3MoeConfig,
)

import fastpost
from fastpost.adapters.load_nf4 import load_nf4
from fastpost.adapters.nf4_coverage import coverage_of
from fastpost.adapters.nf4_layer import Nf4Linear
from fastpost.adapters.weight_files import WeightFolder
from fastpost.backbone import FastpostWarning
from fastpost.demo.smollm2 import smollm2_path
from fastpost_kernels import nf4_dequantize, nf4_quantize
from tests.trainers.conftest import *  # noqa: F403  fixtures: tokenizer, data, run_trainer
from tests.trainers.conftest import tiny_model

FP32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(3, 67).view(2, 32)
TINY_MIXTURE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "num_experts_per_tok": 2,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "base"
    model = tiny_model(97)
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(path)
    return path


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def rounded(folder: Path, dtype: torch.dtype = FP32, **options: Any) -> Any:
    """The dense model with the weights that 4 bits leave of it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    exact = _tensors(folder)
    for path, module in model.named_modules():
        if type(module) is nn.Linear and path != "lm_head":
            weight = nf4_quantize(exact[path + ".weight"], **options)
            module.weight.data = nf4_dequantize(weight, dtype)
    return model


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = WeightFolder(folder)
    return {name: files.read(name) for name in files.shard_of}


@pytest.mark.parametrize(
    "options", [{}, {"double_quant": False, "block_size": 32}, {"storage": BF16}]
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_is_the_model_with_rounded_weights(folder, dtype, options) -> None:
    model = load_nf4(folder, dtype=dtype, device="cpu", **options)
    wanted = logits(rounded(folder, dtype, **options))
    torch.testing.assert_close(
        logits(model), wanted, atol=1e-5 if dtype == FP32 else 0.1, rtol=0.02
    )
    layers = [m for m in model.modules() if isinstance(m, Nf4Linear)]
    assert len(layers) == 14 and {layer.compute_dtype for layer in layers} == {dtype}
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight.dtype == dtype
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert model.generation_config.max_new_tokens == 17
    assert model.config._name_or_path == str(folder)


def test_is_public() -> None:
    assert fastpost.load_nf4 is load_nf4


def test_shards_and_an_untied_head(tmp_path) -> None:
    whole = tiny_model(97, tie_word_embeddings=False, attention_bias=True)
    for name, parameter in whole.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(WeightFolder(tmp_path).shards) > 3
    model = load_nf4(tmp_path, dtype=FP32, device="cpu")
    torch.testing.assert_close(logits(model), logits(rounded(tmp_path)), atol=1e-5, rtol=1e-4)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_head_named_instead_of_the_embeddings_it_is_tied_to(folder) -> None:
    wanted = logits(load_nf4(folder, dtype=FP32, device="cpu"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load_nf4(folder, dtype=FP32, device="cpu")), wanted)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "phi3", "cohere2", "glm4"])
def test_other_architectures(kind, tmp_path) -> None:
    size = {"num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    dense = {k: v for k, v in TINY_MIXTURE.items() if k != "num_experts_per_tok"}
    config = AutoConfig.for_model(kind, **(dense | size))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_nf4(tmp_path, dtype=FP32, device="cpu")
    torch.testing.assert_close(logits(model), logits(rounded(tmp_path)), atol=1e-5, rtol=1e-4)
    model = load_nf4(tmp_path, device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    ours = dict(model.named_buffers())
    for name, buffer in stock.named_buffers():
        assert ours[name].dtype == buffer.dtype and torch.equal(ours[name], buffer), name


def test_skipped_layers_stay_dense(folder) -> None:
    model = load_nf4(folder, device="cpu", skip=("lm_head", "down_proj", "self_attn"))
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, Nf4Linear)}
    assert names == {"gate_proj", "up_proj"}
    assert model.model.layers[0].mlp.down_proj.weight.dtype == BF16


def test_coverage(folder) -> None:
    model = load_nf4(folder, device="cpu")
    found = coverage_of(model)
    linear = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    assert found.weights == sum(p.numel() for p in tiny_model(97).parameters())
    assert found.fraction == linear / found.weights
    kinds = {kind.kind: kind for kind in found.kinds}
    assert kinds["q_proj"][1:4] == (2, 2 * 64 * 64, 2 * 64 * 64)
    assert kinds["embed_tokens"][1:] == (1, 97 * 64, 0, 97 * 64 * 2)
    blocks = 64 * 128 // 64
    assert kinds["up_proj"].num_bytes == 2 * (64 * 128 // 2 + blocks + 4 + 4 * 256 + 4)
    assert f"{found.fraction:.1%} of {found.weights:,} weights" in str(found)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", use_dora=True))
    assert coverage_of(wrapped) == found


def test_its_own_files_load_and_are_those_of_bitsandbytes(folder, tmp_path, monkeypatch) -> None:
    model = load_nf4(folder, dtype=FP32, device="cpu")
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    again = load_nf4(tmp_path / "saved", dtype=FP32, device="cpu", block_size=32)
    assert torch.equal(logits(again), logits(model))
    bnb = pytest.importorskip("bitsandbytes")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=FP32)
    count = 0
    for path, layer in stock.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            count += 1
            dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(dense, model.get_submodule(path).dequantize()), path
    assert count == 14
    torch.testing.assert_close(stock.lm_head.weight, model.lm_head.weight, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"double": False}, {"storage": "bfloat16"}])
def test_reads_what_bitsandbytes_wrote_without_it(folder, tmp_path, monkeypatch, options) -> None:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=options.get("double", True),
        bnb_4bit_quant_storage=options.get("storage", "uint8"),
    )
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32, quantization_config=config)
    stock.save_pretrained(tmp_path / "stock")
    assert any("quant_state" in name for name in WeightFolder(tmp_path / "stock").shard_of)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = load_nf4(tmp_path / "stock", dtype=FP32, device="cpu")
    wanted = logits(rounded(folder, double_quant=options.get("double", True)))
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-4)
    assert model.model.layers[0].mlp.up_proj.packed.dtype == getattr(
        torch, options.get("storage", "uint8")
    )


def test_hub_names_fetch_safetensors_and_nothing_else(folder, monkeypatch) -> None:
    asked = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("fastpost.adapters.load_nf4.snapshot_download", download)
    model = load_nf4("org/model", revision="abc", device="cpu")
    assert (asked["name"], asked["revision"]) == ("org/model", "abc")
    assert not any(p.endswith((".bin", ".pt", "*", ".py")) for p in asked["allow_patterns"])
    assert model.config._name_or_path == "org/model"


def test_experts_stored_one_by_one_are_refused_by_name(tmp_path) -> None:
    config = Qwen3MoeConfig(**TINY_MIXTURE, moe_intermediate_size=32, num_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts\.down_proj'.*3-D parameter.*from_pretrained"):
        load_nf4(tmp_path, device="cpu")


def test_experts_stored_together_are_reported(tmp_path) -> None:
    config = GptOssConfig(**TINY_MIXTURE, num_local_experts=4, sliding_window=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.warns(FastpostWarning, match="2 parameters hold the experts"):
        model = load_nf4(tmp_path, dtype=FP32, device="cpu")
    found = coverage_of(model)
    assert found.experts == tuple(
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    )
    assert "not quantised: 2 parameters of experts" in str(found) and 0 < found.fraction < 0.5
    wanted = rounded(tmp_path)
    torch.testing.assert_close(logits(model), logits(wanted), atol=1e-5, rtol=1e-4)


def test_a_model_without_linear_layers_is_refused(tmp_path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no nn"):
        load_nf4(tmp_path, device="cpu")


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_files_that_do_not_fit_are_refused(folder, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither model\.safetensors"):
        load_nf4(tmp_path / "empty")
    _edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantised otherwise"):
        load_nf4(folder)
    _edit_config(folder, quantization_config=None, intermediate_size=64)
    with pytest.raises(ValueError, match=r"_proj.weight is \(.*128.*of another configuration"):
        load_nf4(folder)
    _edit_config(folder, intermediate_size=128, vocab_size=96)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \(97, 64\) in the file, \(96"):
        load_nf4(folder)
    _edit_config(folder, vocab_size=97, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks 9 of .*first 'model\.layers\.2\."):
        load_nf4(folder)
    _edit_config(folder, num_hidden_layers=1)
    with pytest.warns(FastpostWarning, match=r"9 tensors .* have no place in the model"):
        load_nf4(folder)


_PEAK = """
import sys
from fastpost.adapters.load_nf4 import load_nf4
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10
load_nf4(sys.argv[1], device="cpu")  # what is imported on the way
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = load_nf4(sys.argv[2], device="cpu")
print(status("VmHWM") - before, sum(t.numel() * t.itemsize for t in
    [*model.parameters(), *model.buffers()]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_holds_one_shard_and_the_4_bit_model(folder, tmp_path) -> None:
    size = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16}
    large = tmp_path / "large"
    tiny_model(512, **size).save_pretrained(large, max_shard_size="15MB")
    files = [path.stat().st_size for path in large.glob("*.safetensors")]
    command = [sys.executable, "-c", _PEAK, str(folder), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, kept = map(int, done.stdout.split())
    workspace = 24 * 512 * 1024  # of quantising the largest weight
    assert len(files) > 8 and kept < sum(files) / 6
    assert peak < max(files) + kept + workspace + (16 << 20) < sum(files) / 2


def test_trains_adapters(folder, tmp_path, run_trainer, messages_data, tokenizer) -> None:
    path = folder.parent / "trained"
    tiny_model(len(tokenizer)).save_pretrained(path)
    options = {"peft_config": LoraConfig(r=4, target_modules="all-linear", use_dora=True)}
    losses = []
    for model in (load_nf4(path, dtype=FP32, device="cpu"), rounded(path)):
        trainer = run_trainer(
            fastpost.SFTTrainer,
            fastpost.SFTConfig,
            model,
            messages_data,
            options,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            max_steps=4,
        )
        losses.append(torch.tensor(trainer.trace.losses))
        if len(losses) == 1:
            trained = trainer.model
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=0)
    assert losses[0][-1] < losses[0][0] - 0.05
    trained.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        load_nf4(path, dtype=FP32, device="cpu"), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(again), logits(trained.eval()), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_shards_with_fsdp2(folder, storage) -> None:
    script = Path(__file__).with_name("nf4_fsdp_child.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(folder), storage], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_real_model_still_answers() -> None:
    path = smollm2_path()
    model = load_nf4(path, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert coverage_of(model).fraction > 0.75
