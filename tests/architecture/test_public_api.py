"""The public names. A change here is a change users see: make it on purpose."""

from __future__ import annotations

import fastpost
import fastpost_kernels


def test_fastpost() -> None:
    assert sorted(fastpost.__all__) == [
        "CPOConfig",
        "CPOTrainer",
        "DPOConfig",
        "DPOTrainer",
        "GRPOConfig",
        "GRPOTrainer",
        "KTOConfig",
        "KTOTrainer",
        "ORPOConfig",
        "ORPOTrainer",
        "OnlineDPOConfig",
        "OnlineDPOTrainer",
        "PPOConfig",
        "PPOTrainer",
        "PRMConfig",
        "PRMTrainer",
        "PackPlan",
        "RLOOConfig",
        "RLOOTrainer",
        "RewardConfig",
        "RewardTrainer",
        "SFTConfig",
        "SFTTrainer",
        "accelerate_model",
        "load_nf4",
        "pack",
    ]


def test_fastpost_kernels() -> None:
    assert sorted(fastpost_kernels.__all__) == [
        "AdamW8bit",
        "AdamWState",
        "HeadRows",
        "LinearCrossEntropy",
        "LinearLogprob",
        "LoraHead",
        "LoraWeights",
        "Nf4Weight",
        "PreferenceLogratio",
        "VocabParallelLogprob",
        "adamw_8bit_",
        "adamw_state",
        "dora_linear",
        "dora_weight_norm",
        "layers",
        "linear",
        "linear_cross_entropy",
        "linear_logprob",
        "lora_linear",
        "lora_linears",
        "nf4_dequantize",
        "nf4_linear",
        "nf4_quantize",
        "preference_logratio",
        "prefix_attention",
        "reference",
        "rms_norm",
        "row_square_norms",
        "swiglu",
        "vocab_parallel_logprob",
        "workspace_bytes",
    ]


def test_every_public_name_exists_and_is_documented() -> None:
    for package in (fastpost, fastpost_kernels):
        for name in package.__all__:
            assert getattr(package, name).__doc__, f"{package.__name__}.{name} has no docstring"


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(fastpost, "NoSuchTrainer")
