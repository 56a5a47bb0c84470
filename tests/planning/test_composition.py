"""Models of 4 and 5 layers give, exactly, what a longer one takes."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from fastpost.planning.composition import trace_composed
from fastpost.planning.request import Adapter, Request
from fastpost.planning.trace import trace

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CASES = {
    "one GPU": Request("tiny", seq=64),
    "FSDP2, bf16, 8 bits": Request(
        "tiny", seq=64, num_gpus=4, precision="bf16", optimizer="adamw_8bit"
    ),
    "DPO, LoRA, accumulated": Request(
        "tiny", "dpo", seq=64, tokens_per_step=256, adapter=Adapter("lora", 8), checkpointing=False
    ),
    "DPO, LoRA, FSDP2": Request("tiny", "dpo", seq=64, adapter=Adapter("lora", 8), num_gpus=2),
    "DPO, LoRA, FSDP2, tiles": Request(
        "tiny", "dpo", seq=64, adapter=Adapter("lora", 8), num_gpus=8, mlp_tile_tokens=32
    ),
    "offloaded": Request("tiny", seq=256, offload=True),
    "GRPO, reference, rollout copy": Request(
        "tiny", "grpo", seq=64, rows=4, group=4, beta=0.1, rollout_dtype="bfloat16"
    ),
}


SLOW = (
    "DPO, LoRA, accumulated",
    "DPO, LoRA, FSDP2, tiles",
    "DPO, LoRA, FSDP2",
    "GRPO, reference, rollout copy",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_composition_is_exact(name: str) -> None:
    whole, composed = trace(CASES[name], CONFIG), trace_composed(CASES[name], CONFIG)
    assert composed.peak.held == whole.peak.held
    for window, peak in composed.windows.items():
        if window.phase != "setup":  # where tensors are dropped whenever Python comes to it
            assert peak.held == whole.windows[window].held, window
    assert composed.at_rest == whole.at_rest
    assert composed.flops == whole.flops
    assert composed.gathered == whole.gathered
    assert composed.sampled == whole.sampled
    assert composed.host_bytes == whole.host_bytes
    assert composed.num_parameters == whole.num_parameters
    assert composed.trained_bytes == whole.trained_bytes
    assert composed.peak.total > 0 and composed.total_flops > 0


@pytest.mark.slow
def test_seventy_billion_parameters_are_planned_within_the_time_promised() -> None:
    request = Request(
        "meta-llama/Llama-3.3-70B-Instruct", num_gpus=8, optimizer="adamw_8bit", precision="bf16"
    )
    traced = trace_composed(request)
    assert traced.num_parameters == 70_553_706_496
    assert traced.headroom > 0
    assert traced.seconds < 90
