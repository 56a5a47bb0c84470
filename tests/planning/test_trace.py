"""What a trace counts, against arithmetic, and against PyTorch's allocator on a real run."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.plan.runs import Case, trial_of
from fastpost.planning.ledger import (
    COMMUNICATION,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    Ledger,
    Moment,
    Window,
)
from fastpost.planning.request import Adapter, Request
from fastpost.planning.trace import trace
from fastpost_kernels import AdamW8bit

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160  # matrices of one layer
MATRICES = 2 * LAYER + 2 * 512 * 64
PARAMETER_COUNT = MATRICES + 5 * 64


def test_full_training_holds_fp32_weights_and_two_states() -> None:
    traced = trace(Request("tiny", seq=64), CONFIG)
    assert traced.num_parameters == traced.num_trained == PARAMETER_COUNT
    assert traced.at_rest[PARAMETERS] == 4 * PARAMETER_COUNT
    assert 8 * PARAMETER_COUNT <= traced.at_rest[OPTIMIZER] < 8 * PARAMETER_COUNT + 1024
    assert GRADIENTS not in traced.at_rest
    assert not traced.fallbacks


def test_flops_are_those_of_the_matrices_and_visible_pairs() -> None:
    traced = trace(Request("tiny", seq=65, checkpointing=False), CONFIG)
    tokens = 64  # the last of a row predicts nothing
    # log-probs of a trained head are computed once more in the backward
    matrices = 6 * tokens * 2 * LAYER + 8 * tokens * 512 * 64
    pairs = tokens * (tokens + 1) // 2
    attention = 2 * 2 * 4 * pairs * 7 * 16
    assert traced.tokens == tokens
    # the input of the first layer's matrices has a gradient too: it belongs to the embedding
    assert traced.total_flops == matrices + attention


def test_checkpointing_computes_more_and_holds_less() -> None:
    kept = trace(Request("tiny", seq=512, checkpointing=False), CONFIG)
    recomputed = trace(Request("tiny", seq=512), CONFIG)
    assert recomputed.total_flops > kept.total_flops
    assert recomputed.peak.total < kept.peak.total


def test_sharding_divides_weights_and_states() -> None:
    one = trace(Request("tiny", seq=64), CONFIG)
    four = trace(Request("tiny", seq=64, num_gpus=4), CONFIG)
    assert four.num_parameters == one.num_parameters
    for category in (PARAMETERS, OPTIMIZER):
        assert four.at_rest[category] == pytest.approx(one.at_rest[category] / 4, rel=0.01)
    assert COMMUNICATION in four.peak.held
    assert four.total_flops == one.total_flops
    # layers and embedding are gathered forward and backward, norm and head once, all in bf16
    gathered = 2 * (2 * 2 * (LAYER + 2 * 64) + 2 * 512 * 64 + 512 * 64 + 64)
    assert four.gathered["_allgather_base_"] == gathered
    assert four.gathered["_reduce_scatter_base_"] == 4 * PARAMETER_COUNT


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_adapters_train_their_own_tensors_only(kind: str) -> None:
    traced = trace(Request("tiny", seq=64, adapter=Adapter(kind, 8)), CONFIG)
    rank, widths = 8, [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)]
    expected = 2 * sum(rank * (k + n) + (n if kind == "dora" else 0) for k, n in widths)
    assert traced.num_trained == expected
    assert traced.num_parameters == PARAMETER_COUNT + expected
    assert traced.at_rest[OPTIMIZER] < 8 * expected + 4 * 64
    weights = 2 * LAYER * (0.5 if kind == "qlora" else 2) + 2 * (PARAMETER_COUNT - 2 * LAYER)
    assert traced.at_rest[PARAMETERS] == weights + 4 * expected
    name = "nf4_linear_fwd" if kind == "qlora" else "lora_linear_fwd"
    assert f"fastpost_kernels::{name}" in traced.flops


@pytest.mark.parametrize("method", ["dpo", "grpo"])
@pytest.mark.parametrize("adapter", [None, Adapter("lora", 8)])
def test_methods_are_traced_on_unique_tokens(method: str, adapter: Adapter | None) -> None:
    rows = 4
    traced = trace(Request("tiny", method, seq=64, rows=rows, group=4, adapter=adapter), CONFIG)
    sides = 2 if method == "dpo" else 1
    prompts = rows if method == "dpo" else 1
    assert traced.tokens == prompts * 32 + rows * sides * 31
    assert ("reference" in traced.at_rest) == (method == "dpo" and adapter is None)
    assert not traced.fallbacks


def test_accumulation_meets_the_gradients_of_the_batch_before() -> None:
    once = trace(Request("tiny", seq=64, checkpointing=False), CONFIG)
    twice = trace(Request("tiny", seq=64, checkpointing=False, tokens_per_step=128), CONFIG)
    assert twice.request.accumulation == 2
    assert twice.total_flops == once.total_flops
    assert twice.peak.total > once.peak.total


def test_a_ledger_names_bytes_afterwards() -> None:
    ledger = Ledger()
    forward, backward = Moment("forward", "", "a"), Moment("backward", "", "b")
    kept = ledger.open(10, "activations", forward)
    grown = ledger.open(5, "activations", backward)
    ledger.resize(grown, 7, backward)
    ledger.resize(kept, 0, backward)
    ledger.name(grown, GRADIENTS)
    peak = ledger.peaks()[Window("backward", "", 1)]
    assert peak.held == {GRADIENTS: 7, "activations": 10} and peak.total == 17
    assert ledger.held() == {GRADIENTS: 7}


SMALL = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def test_the_peak_is_what_the_allocator_gives() -> None:
    """A trainer's real steps on the CPU. The embedding's gradient comes last and is large: the peak
    lies behind the attention, whose workspace is an upper bound."""
    settings = {"memory_budget_gb": 0.01, "gradient_accumulation_steps": 2}
    found = trial_of(Case("SFT", 1, 0, 96, settings=settings, model=SMALL))
    assert found.predicted == pytest.approx(found.measured, rel=0.05)
    assert not torch.distributed.is_initialized()


def test_eight_bit_states_are_those_of_a_real_optimizer() -> None:
    """`AdamW8bit` itself is traced: its states are those that a real one makes, byte for byte."""
    request = Request("tiny", seq=64, optimizer="adamw_8bit", precision="bf16")
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    optimizer = AdamW8bit(model.parameters())
    model(input_ids=torch.ones(1, 8, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    made = sum(t.numel() * t.itemsize for t in states)
    assert trace(request, CONFIG).at_rest[OPTIMIZER] == made
