"""Models by name without weights and without the network: bundled configurations, files, folders.

`configs/ORGANISATION--NAME.json` holds the shape of a well-known model under its id on the Hub.
Fine-tuned variants have the shape of their base, so `-Instruct`, `-Base` and `-it` may be added to
or left off an id.
"""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

__all__ = ["bundled_models", "load_config", "make_model"]

_VARIANTS = ("-Instruct", "-Base", "-it")


def bundled_models() -> list[str]:
    """Ids of the models whose configuration is bundled."""
    folder = resources.files("fastpost.planning").joinpath("configs")
    names = (entry.name for entry in folder.iterdir() if entry.name.endswith(".json"))
    return sorted(name.removesuffix(".json").replace("--", "/") for name in names)


def load_config(model: str) -> PreTrainedConfig:
    """The configuration of a bundled id, of a `config.json`, or of a folder that holds one.

    Raises:
        ValueError: nothing of that name, or not a configuration of a causal language model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"model {model}: {path}: {error.strerror}") from None
    else:
        text = _bundled(model)
    try:
        fields = json.loads(text)
        kind = fields.pop("model_type")
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f"model {model}: expected a config.json with a model_type") from None
    config = AutoConfig.for_model(kind, **fields)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"model {model}: {kind} is not a causal language model of transformers")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"model {model} is quantised: plan its 16-bit base, with --adapter qlora:RANK to keep "
            "its weights in 4 bits"
        )
    return config


def make_model(
    config: PreTrainedConfig, dtype: torch.dtype, *, is_reward: bool = False
) -> nn.Module:
    """The model of transformers, to be called where tensors have no memory.

    Args:
        config: its configuration.
        dtype: of its weights.
        is_reward: one number a row in place of a head over the vocabulary.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    if not is_reward:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.num_labels, config.pad_token_id = 1, 0
    return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def _bundled(model: str) -> str:
    known = {name.lower(): name for name in bundled_models()}
    plain = {_without_variant(name): full for name, full in known.items()}
    asked = model.lower()
    name = known.get(asked) or plain.get(_without_variant(asked))
    if name is None:
        by_name = {full.split("/")[1].lower(): full for full in known.values()}
        name = by_name.get(asked)
    if name is None:
        raise ValueError(
            f"model {model}: no such file or folder, and no bundled configuration; bundled are "
            f"{', '.join(bundled_models())}. Download the model's config.json and pass its path"
        )
    file = resources.files("fastpost.planning").joinpath("configs", name.replace("/", "--"))
    return Path(f"{file}.json").read_text(encoding="utf-8")


def _without_variant(name: str) -> str:
    for ending in _VARIANTS:
        name = name.removesuffix(ending.lower())
    return name
