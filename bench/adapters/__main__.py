"""`python -m bench.adapters [KIND ...]`: a table, and bench/results/adapters.json.

`python -m bench.adapters nf4` measures a frozen 4-bit layer alone (`bench.adapters.nf4`).

A step is forward, loss on the answers, backward, AdamW on the adapter; the same rows for everyone.
Three contenders from equal weights: PEFT on the stock model; PEFT with our adapted and fused layers
alone, on the same padded rows; and our engine (packing, prefix attention, no logits). Losses are
compared before anything is timed. Rounds go through all contenders of a base (16-bit or 4-bit, LoRA
and DoRA) in turn; the ratio printed is of the fastest rounds, which other processes disturb least.
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

_COMPARED = ("fastest_s", "median_s", "gflop")
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


def measure(
    kinds: tuple[str, ...], batch: dict[str, Tensor], rounds: int, clock: Clock
) -> list[dict[str, Any]]:
    """Kinds of one base, all their contenders in turn, so that kinds can be compared too."""
    pairs = [(kind, name) for kind in kinds for name in CONTENDERS]
    steps = {pair: contender(pair[1], pair[0], batch) for pair in pairs}
    losses, gflop = {}, {}
    for pair, step in steps.items():  # the first step, which is not timed
        with FlopCounterMode(display=False) as counter:
            losses[pair] = step()
        gflop[pair] = round(counter.get_total_flops() / 1e9, 1)
    for (kind, name), loss in losses.items():
        if abs(loss - losses[kind, "PEFT"]) > 0.02 * abs(losses[kind, "PEFT"]):
            raise RuntimeError(f"{kind}: {name} has another loss than PEFT: {losses}")
    times: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for _ in range(rounds):
        for pair, step in steps.items():
            times[pair].append(clock.milliseconds(step) / 1e3)
    return [
        {
            "adapter": kind,
            "implementation": name,
            "loss": round(losses[kind, name], 4),
            "median_s": round(statistics.median(times[kind, name]), 3),
            "fastest_s": round(min(times[kind, name]), 3),
            "peak_mb": round(peak_bytes(step) / 1e6),
            "gflop": gflop[kind, name],
            "layer_keeps_kb": saved_bytes(build(kind), name != "PEFT") // 1024,
        }
        for (kind, name), step in steps.items()
    ]


def summary(found: list[dict[str, Any]]) -> str:
    """DoRA over LoRA of our engine, in time and FLOPs; empty where one was not measured."""
    ours = {r["adapter"][-4:]: r for r in found if r["implementation"] == CONTENDERS[-1]}
    if len(ours) < 2:
        return ""
    ratios = (f"{key} {ours['dora'][key] / ours['lora'][key]:.3f}x" for key in _COMPARED)
    return "DoRA over LoRA, engine: " + ", ".join(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.adapters", description=__doc__)
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}, or nf4: all"
    )
    parser.add_argument("--rows", type=int, default=8, help="8, as transformers has it")
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
    wanted = options.kinds or KINDS
    for is_four_bit in (False, True):
        kinds = tuple(kind for kind in wanted if kind.startswith("q") == is_four_bit)
        found = measure(kinds, batch, options.rounds or 5, clock) if kinds else []
        stock = {row["adapter"]: row for row in found if row["implementation"] == "PEFT"}
        for row in found:
            ratio = row["fastest_s"] / stock[row["adapter"]]["fastest_s"]
            print(*(f"{value!s:>16}" for value in row.values()), f"{ratio:>8.2f}x", flush=True)
        print(summary(found), flush=True)
        results += found
    head = describe("bench.adapters") | {"rank": RANK, "rows": options.rows}
    head |= {"clock": clock_name, "threads": threads, "rounds": options.rounds or 5}
    if len(results) < len(KINDS) * len(CONTENDERS):
        return  # the stored table is of one complete run
    (RESULTS / "adapters.json").write_text(json.dumps(head | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
