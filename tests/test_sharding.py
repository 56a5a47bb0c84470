"""What is corrected in, or refused of, the sharding that was asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaConfig, LlamaForCausalLM

from fastpost.sharding import check_sharding, decoder_layers, keep_precision


def an_accelerator(**plugin: Any) -> Any:
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin)))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_weights_are_gathered_as_asked_and_nothing_else_is_rounded(dtype) -> None:
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=dtype, output_dtype=dtype) if dtype else None
    accelerator = an_accelerator(fsdp_version=2, mixed_precision_policy=policy)
    keep_precision(accelerator)
    kept = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert kept.param_dtype == dtype
    assert kept.reduce_dtype == torch.float32 and kept.output_dtype is None


def test_the_first_fsdp_is_refused_and_no_fsdp_left_alone() -> None:
    with pytest.raises(ValueError, match="fsdp_version is 1"):
        keep_precision(an_accelerator(fsdp_version=1, mixed_precision_policy=None))
    keep_precision(SimpleNamespace(state=SimpleNamespace()))


def a_trainer(**options: Any) -> Any:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=options.pop("tied", False),
    )
    return SimpleNamespace(
        args=SimpleNamespace(fsdp=options.pop("fsdp", False)),
        is_fsdp_enabled=False,
        accelerator=SimpleNamespace(distributed_type="MULTI_CPU"),
        model=LlamaForCausalLM(config),
        **options,
    )


def test_sharding_that_would_not_happen_is_refused() -> None:
    with pytest.raises(ValueError, match="would hold a whole model in every process"):
        check_sharding(a_trainer(fsdp=True))
    check_sharding(a_trainer())


def test_a_tied_head_that_would_not_be_trained_is_refused() -> None:
    loaded = {"is_distributed_loading_by_transformers": True}
    with pytest.raises(ValueError, match="ties its head to its embedding"):
        check_sharding(a_trainer(tied=True, **loaded))
    check_sharding(a_trainer(tied=False, **loaded))
    frozen = a_trainer(tied=True, **loaded)
    frozen.model.requires_grad_(False)
    check_sharding(frozen)


def test_layers_are_found_or_named_as_missing() -> None:
    model = a_trainer().model
    assert decoder_layers(model) == list(model.model.layers)
    with pytest.raises(ValueError, match="Linear has no list of decoder layers"):
        bare = nn.Linear(2, 2)
        bare.base_model = bare
        decoder_layers(bare)
