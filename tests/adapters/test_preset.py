"""The preset `adapter="best"`: what it is, where it acts, what it refuses."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from peft import LoraConfig

from fastpost.adapters.preset import BEST_LORA_PLUS_RATIO, preset_argument


def arguments(**fields):
    return SimpleNamespace(**({"adapter": "best", "lora_plus_ratio": None} | fields))


def test_preset_is_dora_with_lora_plus_and_is_shown_in_full(caplog) -> None:
    args = arguments()
    with caplog.at_level(logging.WARNING, "fastpost"):
        config = preset_argument(args, {"peft_config": None}, "SEQ_CLS")["peft_config"]
    assert config.use_dora and config.target_modules == "all-linear"
    assert (config.r, config.lora_alpha, config.task_type) == (32, 64, "SEQ_CLS")
    assert args.lora_plus_ratio == BEST_LORA_PLUS_RATIO
    for shown in ("DoRA r 32", "alpha 64", "all-linear", "LoRA+ ratio 16", "'use_dora': True"):
        assert shown in caplog.text


def test_a_ratio_of_ones_own_stays() -> None:
    args = arguments(lora_plus_ratio=4.0)
    preset_argument(args, {})
    assert args.lora_plus_ratio == 4.0


def test_without_a_preset_nothing_is_added() -> None:
    args = arguments(adapter=None)
    assert preset_argument(args, {"peft_config": LoraConfig()}) == {}
    assert args.lora_plus_ratio is None


def test_unknown_preset_and_a_second_adapter_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 'best' or None, got 'finest'"):
        preset_argument(arguments(adapter="finest"), {})
    with pytest.raises(ValueError, match="another was given"):
        preset_argument(arguments(), {"peft_config": LoraConfig()})
