"""Bundled configurations are those of the models they are named after."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastpost.planning.models import bundled_models, load_config

# Parameters, tied ones once, as the model cards give them.
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
}


def test_every_bundled_model_is_checked() -> None:
    assert bundled_models() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["Qwen3-8B", "qwen/qwen3-8b", "Qwen/Qwen3-8B-Base"])
def test_variants_of_a_name_are_found(name: str) -> None:
    assert load_config(name).hidden_size == 4096


def test_files_and_folders_are_read(tmp_path) -> None:
    fields = {"model_type": "llama", "hidden_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load_config(str(tmp_path)).hidden_size == 96
    assert load_config(str(tmp_path / "config.json")).hidden_size == 96


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 96}, "model_type"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_other_files_are_refused(fields, message, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path))


def test_an_unknown_name_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"bundled are .*Qwen/Qwen3-8B"):
        load_config("nobody/nothing")
