"""`python -m bench.scale [--only WORD ...] [--store]`: ours against stock TRL at 8B, 32B, 70B.

Traced on tensors without memory, no GPU needed: FLOPs and peak bytes per GPU of one optimizer step,
the longest row that fits, and what was promised of them. Two processes; docs/scale.md says what was
traced and how.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch

from bench.environment import RESULTS, describe
from bench.scale.bars import BARS, TILE, row_batch
from bench.scale.cases import ADAPTERS, MODELS, Case, every_case
from bench.scale.lengths import Row
from bench.scale.longest import longest_that_fits
from bench.scale.sides import ours, stock, summary

__all__: list[str] = []

GIB = 2**30
WAYS = ("TRL", "ours", "ours, offloaded and tiled")


def quiet() -> None:
    """One thread a process, and none of the peers' advice between the rows."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def compare(case: Case) -> dict[str, Any]:
    """One row of the table."""
    request = case.request()
    batch = row_batch(request, case.rows())
    found = {"ours": summary(ours(request, batch)), "TRL": summary(stock(request, batch))}
    return {
        **asdict(case),
        "gpus": request.num_gpus,
        "padded_tokens": batch["input_ids"].numel(),
        "scored_tokens": int((batch["labels"] != -100).sum()),
        **found,
        "flops_ratio": found["ours"]["flops"] / found["TRL"]["flops"],
        "activation_ratio": found["ours"]["activation_bytes"] / found["TRL"]["activation_bytes"],
    }


def longest(model: str, adapter: str, way: str) -> dict[str, Any]:
    """The longest row of SFT that fits, one row a GPU."""
    is_far = way == WAYS[2]
    request = Case(model, "sft", adapter).request(offload=is_far)

    def run(tokens: int) -> Any:
        batch = row_batch(request, [Row(0, 1, tokens - 1)])
        if way == "TRL":
            return stock(request, batch)
        return ours(request, batch, tile_tokens=TILE if is_far else None)

    start = (2 * TILE, 4 * TILE) if is_far else (4096, 16384)
    found = longest_that_fits(run, request.gpu.usable, start)
    return {"model": model, "adapter": adapter, "way": way, **asdict(found)}


def bar(name: str) -> list[dict[str, Any]]:
    """What was traced for one of `BARS`."""
    return [asdict(verdict) for verdict in BARS[name]()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows that contain all words")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--store", action="store_true", help="write bench/results/scale.json")
    options = parser.parse_args()
    began = time.perf_counter()
    jobs: dict[str, tuple[Any, ...]] = {f"bar {name}": (bar, name) for name in BARS}
    jobs |= {f"step {case}": (compare, case) for case in every_case()}
    jobs |= {
        f"longest {model} {adapter} {way}": (longest, model, adapter, way)
        for model in MODELS
        for adapter in ADAPTERS
        for way in WAYS
    }
    words = options.only or []
    jobs = {name: job for name, job in jobs.items() if all(word in name.split() for word in words)}
    if not jobs:
        parser.error(f"no row contains all of {words}")
    found: dict[str, Any] = {}
    with ProcessPoolExecutor(options.processes, get_context("spawn"), quiet) as pool:
        futures: dict[Future[Any], str] = {pool.submit(*job): name for name, job in jobs.items()}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            print(f"  traced {futures[future]}", flush=True)
    result = {
        "bars": [row for name in jobs if name.startswith("bar") for row in found[name]],
        "steps": [found[name] for name in jobs if name.startswith("step")],
        "longest": [found[name] for name in jobs if name.startswith("longest")],
        "seconds": round(time.perf_counter() - began),
    }
    print("\n".join(report(result)))
    if options.store and not words:
        path = RESULTS / "scale.json"
        path.write_text(json.dumps(describe("bench.scale") | result, indent=1) + "\n")


def report(result: dict[str, Any]) -> list[str]:
    """The result in Markdown."""
    lines = [
        "",
        "| traced | GPUs | tokens: padded -> ours | TFLOP a GPU: TRL -> ours | ratio "
        "| peak GiB: TRL -> ours | activations and head GiB: TRL -> ours | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["steps"]:
        sides = (row["TRL"], row["ours"])
        flops, peaks, acts = (
            " -> ".join(
                f"{side[key] / unit:,.1f}" + ("" if key != "peak_bytes" or side["fits"] else " (no)")
                for side in sides
            )
            for key, unit in (("flops", 1e12), ("peak_bytes", GIB), ("activation_bytes", GIB))
        )
        lines.append(
            f"| {row['model']} {row['method'].upper()} {row['adapter']} | {row['gpus']} "
            f"| {row['padded_tokens']:,} -> {row['ours']['tokens']:,} | {flops} "
            f"| {row['flops_ratio']:.2f} | {peaks} | {acts} | {row['activation_ratio']:.2f} |"
        )
    lines += ["", "| longest row of SFT, traced | " + " | ".join(WAYS) + " |", "|---|---|---|---|"]
    rows: dict[str, list[str]] = {}
    for row in result["longest"]:
        tokens = f"{row['tokens']:,}" if row["tokens"] else "none"
        rows.setdefault(f"{row['model']} {row['adapter']}", []).append(tokens)
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    lines += ["", "| promised | traced | |", "|---|---|---|"]
    for row in result["bars"]:
        lines.append(f"| {row['bar']} | {row['found']} | {'met' if row['met'] else 'MISSED'} |")
    return [*lines, "", f"Traced in {result['seconds']} s."]


if __name__ == "__main__":
    main()
