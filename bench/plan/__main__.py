"""`python -m bench.plan [CASE ...]`: predicted peak memory against what PyTorch's allocator gave.

A model of SmolLM2's shape is made and trained for two real steps on the CPU while PyTorch's
profiler records every allocation; beside it stands what the planner predicts, without having seen
any of it. Nothing is shared between the two but the configuration and the shape of the batch.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.environment import RESULTS, describe
from bench.ops.measuring import peak_bytes
from fastpost import accelerate_model
from fastpost.planning.batches import worst_batch
from fastpost.planning.models import load_config
from fastpost.planning.request import Adapter, Request
from fastpost.planning.trace import trace

MODEL = "HuggingFaceTB/SmolLM2-135M"
LORA = Adapter("lora", 32)
CASES = {
    "full": Request(MODEL, seq=1024, checkpointing=False),
    "full, checkpointing": Request(MODEL, seq=1024),
    "full, two rows": Request(MODEL, seq=512, rows=2, checkpointing=False),
    "full, bf16": Request(MODEL, seq=1024, precision="bf16"),
    "LoRA": Request(MODEL, seq=1024, adapter=LORA, checkpointing=False),
    "LoRA, checkpointing": Request(MODEL, seq=1024, adapter=LORA),
    "LoRA, long": Request(MODEL, seq=3072, adapter=LORA),
}


def real_run(request: Request, config: Any) -> Callable[[], None]:
    """Two optimizer steps of a request, the model's construction included."""

    def run() -> None:
        is_wide = request.precision == "mixed" and request.adapter is None
        dtype = torch.float32 if is_wide else torch.bfloat16
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if request.adapter is not None:
            rank = request.adapter.rank
            model = get_peft_model(
                model,
                LoraConfig(
                    r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
                ),
            )
        engine = accelerate_model(model, memory_budget_gb=request.memory_budget_gb)
        if request.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True
        )
        batch = worst_batch(request, config.vocab_size)
        count = (batch["labels"][:, 1:] != -100).sum()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=request.precision == "mixed"):
                loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        engine.remove()

    return run


def compare(name: str) -> dict[str, Any]:
    """One row: predicted and measured bytes, and by how much the first is off."""
    request = CASES[name]
    traced = trace(request, on_gpu=False)
    gc.collect()  # what an earlier case left must not be freed within
    measured = peak_bytes(real_run(request, load_config(request.model)))
    return {
        "case": name,
        "seq": request.seq,
        "rows": request.rows,
        "predicted_bytes": traced.peak.total,
        "measured_bytes": measured,
        "error": traced.peak.total / measured - 1,
        "moment": str(traced.peak.moment),
        "held": traced.peak.held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}: all")
    parser.add_argument("--store", action="store_true", help="write bench/results/plan.json")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; choose from {', '.join(CASES)}")
    rows = []
    print("| SmolLM2-135M, CPU | rows x tokens | predicted MiB | measured MiB | error |")
    print("|---|---|---|---|---|")
    for name in options.cases or CASES:
        row = compare(name)
        rows.append(row)
        print(
            f"| {name} | {row['rows']} x {row['seq']:,} | {row['predicted_bytes'] / 2**20:,.1f} | "
            f"{row['measured_bytes'] / 2**20:,.1f} | {row['error']:+.1%} |",
            flush=True,
        )
    if options.store:
        path = RESULTS / "plan.json"
        path.write_text(json.dumps(describe("bench.plan") | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
