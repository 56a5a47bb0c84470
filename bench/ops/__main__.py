"""`python -m bench.ops [head|preference|attention|layers|optimizer|all]`: ours beside peers.

Prints a table and writes `bench/results/ops_<suite>.json` and, time against memory, `.png`. Every
contender is checked against float64 before it is timed. Rounds go through all contenders in turn;
the cpu clock with one thread measures work instead of time and does not mind other processes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.environment import RESULTS, describe
from bench.ops import (
    bench_adamw_8bit,
    bench_layers,
    bench_linear_logprob,
    bench_preference_logratio,
    bench_prefix_attention,
)
from bench.ops.contender import Case
from bench.ops.measuring import CLOCKS, choose_clock, measure
from bench.ops.pareto import plot

SUITES = ("head", "preference", "attention", "layers", "optimizer")


def cases(suite: str, options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """One after the other: the tensors of a case are gone before the next ones come."""
    if suite == "attention":
        for name in bench_prefix_attention.WORKLOADS:
            yield bench_prefix_attention.case(name, device)
        return
    for width in options.widths:
        if suite == "head":
            yield from bench_linear_logprob.cases(width, device, options.rows, options.vocab)
        elif suite == "preference":
            rows = options.rows // 2  # of each side
            yield from bench_preference_logratio.cases(width, device, rows, options.vocab)
        elif suite == "layers":
            yield from bench_layers.cases(width, device)
        else:
            yield bench_adamw_8bit.case(width, device)


def print_row(row: dict[str, Any]) -> None:
    numbers = (
        f"{row['error']:.1e}/{row['error_limit']:.1e}" if "error" in row else "",
        f"{row['median_ms']:.2f}" if "median_ms" in row else row["status"],
        f"{row['over_floor']:.3f}" if "over_floor" in row else "",
        f"{row['peak_extra_mb']:.1f}" if "peak_extra_mb" in row else "",
        f"{row['gflop']:.2f}" if "gflop" in row else "",
    )
    print(f"  {row['implementation']:<30}", *(f"{number:>16}" for number in numbers), flush=True)


def run(suite: str, options: argparse.Namespace) -> None:
    """Measures the cases of a suite; files are written after each: a stop loses one case."""
    device = torch.device(options.device)
    name, clock = choose_clock(options.clock, device)
    facts = describe("bench.ops") | {
        "suite": suite,
        "dtype": "bfloat16",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "clock": name,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    machine = f"{options.threads} threads, {name} clock" if device.type == "cpu" else str(device)
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for case in cases(suite, options, device):
        print(f"{case.op}, {case.shape}")
        columns = ("error/limit", "ms", "over floor", "peak MB", "GFLOP")
        print(f"  {'':<30}", *(f"{column:>16}" for column in columns), flush=True)
        found = measure(case, clock, options.rounds, device)
        for row in found:
            print_row(row)
        rows += found
        text = json.dumps(facts | {"results": rows}, indent=1)
        (options.output / f"ops_{suite}.json").write_text(text + "\n")
        plot(rows, options.output / f"ops_{suite}.png", f"{suite}, bfloat16, {machine}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", nargs="?", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--widths", type=int, nargs="+", default=[576], help="of heads and layers")
    parser.add_argument("--rows", type=int, default=bench_linear_logprob.ROWS, help="of the heads")
    parser.add_argument("--vocab", type=int, default=bench_linear_logprob.VOCAB)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, help="default: events on GPUs, else wall")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    torch.set_num_threads(options.threads)
    for suite in SUITES if options.suite == "all" else (options.suite,):
        run(suite, options)


if __name__ == "__main__":
    main()
