"""`python -m bench.ops [--threads N] [--clock cpu]`: a table, and bench/results/ops.json.

Rounds go through all contenders in turn, so that a busy machine slows all of them alike. The cpu
clock with one thread measures work instead of time and does not mind other processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from bench.environment import RESULTS, describe
from bench.ops.bench_linear_logprob import Contender, contenders, peak_bytes, problem

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(rows: list[Contender], rounds: int, clock: str) -> list[dict[str, Any]]:
    """Median milliseconds, their ratio to the bare GEMMs, and peak bytes of every contender."""
    times: dict[int, list[float]] = {i: [] for i in range(len(rows))}
    for _ in range(rounds + 1):
        for i, contender in enumerate(rows):
            start = CLOCKS[clock]()
            contender.run()
            times[i].append(1e3 * (CLOCKS[clock]() - start))
    medians = [statistics.median(taken[1:]) for taken in times.values()]  # the first warms up
    floors = {c.op: m for c, m in zip(rows, medians, strict=True) if "bare" in c.name}
    return [
        {
            "op": contender.op,
            "implementation": contender.name,
            "median_ms": round(median, 2),
            "over_bare_gemms": round(median / floors[contender.op], 3),
            "peak_extra_mb": round(peak_bytes(contender.run) / 1e6, 1),
        }
        for contender, median in zip(rows, medians, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = problem(width=options.width)
    table = measure(contenders(data), options.rounds, options.clock)
    for row in table:
        op, name, *numbers = (str(value) for value in row.values())
        print(f"{op:<14}{name:<30}", *(f"{number:>9}" for number in numbers))
    result = describe("bench.ops") | {
        "shape": {"rows": len(data.hidden), "width": options.width, "vocab": len(data.weight)},
        "dtype": "bfloat16",
        "clock": options.clock,
        "threads": options.threads,
        "rounds": options.rounds,
        "results": table,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ops.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
