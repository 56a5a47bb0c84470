"""What methods hold beside their policy, against arithmetic: references, rollouts, host memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from bench.ops.measuring import peak_bytes
from fastpost.planning.ledger import (
    ACTIVATIONS,
    OPTIMIZER,
    PARAMETERS,
    REFERENCE,
    ROLLOUT_COPY,
    Window,
)
from fastpost.planning.request import NOT_PLANNED, Adapter, Request
from fastpost.planning.roofline import Assumptions, predict
from fastpost.planning.trace import trace
from fastpost.rollout.transformers_rollout import TransformersRollout
from tests.planning.test_trace import CONFIG, PARAMETER_COUNT

BUFFERS = 4 * 16  # both tables of angles
LORA = Adapter("lora", 8)


@pytest.mark.parametrize("method", ["kto", "orpo", "simpo", "reward"])
def test_methods_of_preference_are_traced_on_unique_tokens(method: str) -> None:
    rows = 4
    traced = trace(Request("tiny", method, seq=64, rows=rows), CONFIG)
    expected = {
        "kto": rows * 63,
        "orpo": rows * (32 + 2 * 31),
        "simpo": rows * (32 + 2 * 31),
        "reward": rows * (32 + 2 * 32),
    }
    assert traced.tokens == expected[method]
    assert (REFERENCE in traced.at_rest) == (method == "kto")
    assert not traced.fallbacks


@pytest.mark.parametrize("method", NOT_PLANNED)
def test_other_methods_are_refused_by_name(method: str) -> None:
    with pytest.raises(ValueError, match=f"method {method} is not planned: it"):
        Request("tiny", method)


def test_a_reference_is_a_frozen_copy_or_the_adapter_off() -> None:
    request = Request("tiny", "grpo", seq=64, rows=8, checkpointing=False)
    none, copied = trace(request, CONFIG), trace(replace(request, beta=0.1), CONFIG)
    assert REFERENCE not in none.at_rest
    # fp32 like the policy it was loaded as
    assert copied.at_rest[REFERENCE] == 4 * PARAMETER_COUNT + BUFFERS
    adapted = trace(replace(request, beta=0.1, adapter=LORA), CONFIG)
    assert REFERENCE not in adapted.at_rest
    # the reference pass multiplies as the policy's forward does
    plain = trace(replace(request, adapter=LORA), CONFIG)
    assert adapted.total_flops > plain.total_flops
    assert copied.total_flops > none.total_flops


def test_a_rollout_keeps_keys_of_all_its_completions() -> None:
    rows, layers, heads, width = 8, 2, 2, 16
    request = Request("tiny", "grpo", seq=64, rows=rows, precision="bf16", checkpointing=False)
    traced = trace(request, CONFIG)
    assert traced.sampled["cache_bytes"] == 2 * rows * 64 * layers * heads * width * 2
    assert traced.sampled["weight_bytes"] == 2 * PARAMETER_COUNT
    assert any("rollout" in window.phase for window in traced.windows)
    # twice the batches of a step are sampled at once
    twice = trace(replace(request, tokens_per_step=2 * 64 * rows), CONFIG)
    assert twice.sampled["cache_bytes"] == 2 * traced.sampled["cache_bytes"]


def test_a_copy_to_sample_from_stays_whole_on_every_gpu() -> None:
    request = Request(
        "tiny", "rloo", seq=64, rows=8, num_gpus=2, adapter=LORA, rollout_dtype="bfloat16"
    )
    traced = trace(request, CONFIG)
    assert traced.at_rest[ROLLOUT_COPY] == 2 * PARAMETER_COUNT + BUFFERS
    assert traced.sampled["gathered_bytes"] == 0
    without = trace(replace(request, rollout_dtype=None), CONFIG)
    assert ROLLOUT_COPY not in without.at_rest
    assert without.sampled["gathered_bytes"] > 0  # FSDP2, for every token


def test_a_rollout_takes_what_sampling_takes() -> None:
    """The trainers' sampler on a real model, by PyTorch's profiler."""
    prompt, answer, rows = 64, 24, 8
    config = type(CONFIG)(
        **CONFIG.to_dict() | {"vocab_size": 8192, "hidden_size": 256, "layer_types": None}
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    generation = GenerationConfig(
        max_new_tokens=answer, min_new_tokens=answer, do_sample=True, pad_token_id=0, eos_token_id=2
    )
    sampler = TransformersRollout(lambda: nullcontext(model), generation)
    prompts = torch.randint(3, 8192, (rows, prompt)).tolist()
    measured = peak_bytes(lambda: sampler.generate(prompts))
    seq = prompt + answer
    request = Request(
        "tiny", "grpo", seq=seq, prompt=(prompt + 0.5) / seq, rows=rows, precision="bf16"
    )
    traced = trace(request, config, on_gpu=False)
    windows = {p for p in traced.windows if p[0] == "first step, rollout"}
    peak = max((traced.windows[window] for window in windows), key=lambda peak: peak.total)
    held = traced.at_rest[PARAMETERS] + traced.at_rest["buffers"]
    assert peak.total - held == pytest.approx(measured, rel=0.05)


def test_time_to_sample_follows_the_stated_model() -> None:
    traced = trace(Request("tiny", "grpo", seq=64, rows=8), CONFIG)
    gpu, figures = traced.request.gpu, traced.sampled
    found = predict(traced, Assumptions(reached=0.5))
    token = (figures["weight_bytes"] + figures["cache_bytes"] / 2) / (gpu.bandwidth * 1e9)
    prefill = figures["prefill_flops"] / (gpu.tflops * 0.5e12)
    assert found.sampling == pytest.approx(prefill + 32 * token)
    longest = max(found.compute, found.network)
    assert found.step == pytest.approx(longest + found.weights + found.sampling)


def test_offloaded_inputs_of_layers_lie_in_host_memory() -> None:
    tokens, hidden, layers = 511, 64, 2
    kept = trace(Request("tiny", seq=512, precision="bf16"), CONFIG)
    moved = trace(Request("tiny", seq=512, precision="bf16", offload=True), CONFIG)
    piece = 1 << (2 * tokens * hidden - 1).bit_length()  # bf16, rounded up as pinned memory is
    assert kept.host_bytes == 0 and moved.host_bytes == layers * piece
    assert moved.total_flops == kept.total_flops
    found = predict(moved, Assumptions(host_link=10))
    assert found.host == pytest.approx(2 * moved.host_bytes / 10e9)


def test_offloading_takes_what_grows_with_layers_off_the_gpu() -> None:
    config = type(CONFIG)(**CONFIG.to_dict() | {"num_hidden_layers": 5, "layer_types": None})
    request = Request("tiny", seq=512, precision="bf16")
    window = Window("second step, backward", "head", 1)
    kept, moved = (
        trace(replace(request, offload=offload), config).windows[window].held[ACTIVATIONS]
        for offload in (False, True)
    )
    piece = 2 * 511 * 64
    # two of five are still there when the backward begins
    assert kept - moved == 3 * piece


def test_tiles_of_an_mlp_hold_less() -> None:
    wide = type(CONFIG)(**CONFIG.to_dict() | {"intermediate_size": 4096, "layer_types": None})
    request = Request("tiny", seq=512, precision="bf16")
    window = Window("second step, backward", "layer -1", 1)
    plain, tiled = (trace(replace(request, mlp_tile_tokens=tokens), wide) for tokens in (None, 64))
    assert tiled.windows[window].held[ACTIVATIONS] < plain.windows[window].held[ACTIVATIONS] / 2
    # recomputing an MLP as a whole ends before its last product
    last = 2 * 2 * 511 * 64 * 4096
    assert tiled.total_flops == plain.total_flops + last


def test_an_optimizer_in_the_backward_holds_the_gradients_of_a_layer() -> None:
    request = Request("tiny", seq=64, precision="bf16")
    usual = trace(request, CONFIG)
    within = trace(replace(request, optimizer_in_backward=True), CONFIG)
    held = [peak.held.get("gradients", 0) for peak in within.windows.values()]
    assert max(held) < max(p.held.get("gradients", 0) for p in usual.windows.values())
    assert within.at_rest[OPTIMIZER] == usual.at_rest[OPTIMIZER]
    assert within.total_flops == usual.total_flops
