"""`python -m bench.adapters [KIND ...]`: a table, and bench/results/adapters.json.

`python -m bench.adapters nf4` measures a frozen 4-bit layer alone (`bench.adapters.nf4`).

A step is forward, loss on the answers, backward, AdamW on the adapter; the same rows for everyone.
Three contenders from equal weights: PEFT on the stock model; PEFT with our adapted and fused layers
alone, on the same padded rows; and our engine (packing, prefix attention, no logits). Losses are
compared before anything is timed. Rounds go through all contenders in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from bench.adapters import nf4
from bench.adapters.models import KINDS, RANK, build
from bench.environment import RESULTS, describe
from bench.ops.measuring import Clock, choose_clock, peak_bytes
from bench.trainers.workload import maths_rows
from fastpost import accelerate_model, layers
from fastpost.demo.smollm2 import smollm2_path

__all__: list[str] = []

CONTENDERS = ("PEFT", "fastpost layers", "fastpost engine")


def rows(count: int) -> dict[str, Tensor]:
    """Padded rows with labels on the answers."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    sequences = []
    for row in maths_rows(count, "worked"):
        messages = [*row["prompt"], *row["chosen"]]
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        sequences.append((whole, len(prompt)))
    width = max(len(ids) for ids, _ in sequences)
    shape = (count, width)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for i, (sequence, prompt_length) in enumerate(sequences):
        found = torch.tensor(sequence)
        ids[i, : len(found)], mask[i, : len(found)] = found, 1
        labels[i, prompt_length : len(found)] = found[prompt_length:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def contender(name: str, kind: str, batch: dict[str, Tensor]) -> Callable[[], float]:
    """A step; it returns the loss."""
    model = build(kind)
    options: dict[str, Any] = {}
    if name == "fastpost layers":
        layers.attach(model)
    elif name == "fastpost engine":
        accelerate_model(model)
        options["fused_lm_head"] = True
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def saved_bytes(model: nn.Module, attach: bool) -> int:
    """What one adapted layer keeps of 1,024 tokens for its backward, weights apart."""
    if attach:
        layers.attach(model)
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.gate_proj"))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if 1024 in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(1024, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    del y
    return sum(kept.values())


def measure(kind: str, batch: dict[str, Tensor], rounds: int, clock: Clock) -> list[dict[str, Any]]:
    steps = {name: contender(name, kind, batch) for name in CONTENDERS}
    losses = {name: step() for name, step in steps.items()}
    spread = max(losses.values()) - min(losses.values())
    if spread > 0.02 * abs(losses["PEFT"]):
        raise RuntimeError(f"{kind}: losses differ: {losses}")
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(clock.milliseconds(step) / 1e3)
    found = []
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        found.append(
            {
                "adapter": kind,
                "implementation": name,
                "loss": round(losses[name], 4),
                "median_s": round(statistics.median(times[name]), 3),
                "fastest_s": round(min(times[name]), 3),
                "peak_mb": round(peak_bytes(step) / 1e6),
                "gflop": round(counter.get_total_flops() / 1e9, 1),
                "layer_keeps_kb": saved_bytes(build(kind), name != "PEFT") // 1024,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.adapters", description=__doc__)
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}, or nf4: all"
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, help="5; of nf4 40")
    options = parser.parse_args()
    if options.kinds == ["nf4"]:
        nf4.main(options.rounds or 40)
        return
    batch = rows(options.rows)
    print(
        f"{options.rows} rows, {batch['input_ids'].numel()} padded tokens, "
        f"{int(batch['attention_mask'].sum())} real, {int((batch['labels'] != -100).sum())} scored"
    )
    threads = torch.get_num_threads()
    # of one thread its own clock, which does not run while another process does
    clock_name, clock = choose_clock("cpu" if threads == 1 else "wall", torch.device("cpu"))
    results = []
    for kind in options.kinds or KINDS:
        found = measure(kind, batch, options.rounds or 5, clock)
        for row in found:
            ratio = row["median_s"] / found[0]["median_s"]
            print(*(f"{value!s:>16}" for value in row.values()), f"{ratio:>8.2f}x", flush=True)
        results += found
    head = describe("bench.adapters") | {"rank": RANK, "rows": options.rows}
    head |= {"clock": clock_name, "threads": threads}
    if len(results) < len(KINDS) * len(CONTENDERS):
        return  # the stored table is of one complete run
    (RESULTS / "adapters.json").write_text(json.dumps(head | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
