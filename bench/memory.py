"""`python -m bench.memory`: peak memory of a training step under what `docs/memory.md` describes.

A Llama of SmolLM2's width with bf16 weights, one row of tokens, `AdamW8bit`. Counted is what
PyTorch's allocator held above weights and optimizer states, from the profiler's record of every
allocation, in the second step. Prints the table and writes `bench/results/memory.json`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.environment import RESULTS, describe
from bench.ops.measuring import peak_bytes
from fastpost import accelerate_model
from fastpost.optimizer_in_backward import BackwardSteps
from fastpost.tiled_mlp import tile
from fastpost_kernels import AdamW8bit

# Name -> gradient checkpointing, MLPs in tiles, optimizer in the backward.
CASES = {
    "nothing": (False, False, False),
    "tiles": (False, True, False),
    "checkpointing": (True, False, False),
    "checkpointing, tiles": (True, True, False),
    "checkpointing, tiles, optimizer in the backward": (True, True, True),
}


def peak(case: str, options: argparse.Namespace) -> int:
    """Bytes above weights and states in one step."""
    checkpointing, tiles, in_backward = CASES[case]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=options.tokens,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    engine = accelerate_model(model, memory_budget_gb=0.02)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if tiles:
        tile(model, options.tile)
    optimizer = AdamW8bit(model.parameters(), lr=1e-5)
    steps = BackwardSteps(model, optimizer) if in_backward else None
    ids = torch.randint(3, 4096, (1, options.tokens))

    def step() -> None:
        if steps is not None:
            steps.begin()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    found = peak_bytes(step)
    engine.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"{'peak above weights and states':<52}{'MB':>8}")
    for case in CASES:
        found[case] = peak(case, options)
        print(f"{case:<52}{found[case] / 1e6:>8.1f}", flush=True)
    facts = describe("bench.memory") | {"settings": vars(options), "peak_bytes": found}
    (RESULTS / "memory.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
