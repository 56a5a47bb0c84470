"""A frozen 4-bit layer's forward and backward against the bare products and bitsandbytes' layer.

The floor is what 16-bit weights would take: y = x W^T and dx = dy W, nothing else. Rounds go
through all contenders in turn; ratios are of the fastest rounds, which other processes disturb
least, and with one thread of its clock, which does not run while another process does. Results are
compared before anything is timed.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.environment import RESULTS, describe
from bench.ops.measuring import Clock, choose_clock
from fastpost.adapters.nf4_layer import Nf4Linear
from fastpost_kernels import nf4_dequantize, nf4_quantize

__all__ = ["main"]

# Outputs and inputs: SmolLM2-135M's layers, and one of a model some ten times as large.
SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
ROWS = 1024
Products = tuple[Tensor, Tensor]  # y and dx


def contenders(outputs: int, inputs: int) -> dict[str, Callable[[], Products]]:
    """The floor, ours, and bitsandbytes' where it is installed; the same 4-bit weight in all."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, inputs, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(ROWS, outputs, dtype=torch.bfloat16)
    dense = torch.randn(outputs, inputs, dtype=torch.bfloat16) * inputs**-0.5
    weight = nf4_quantize(dense)
    unpacked = nf4_dequantize(weight)

    def bare() -> Products:
        with torch.no_grad():
            return x @ unpacked.t(), grad @ unpacked

    def through(layer: Callable[[Tensor], Tensor]) -> Callable[[], Products]:
        def run() -> Products:
            y = layer(x)
            return y.detach(), torch.autograd.grad(y, x, grad)[0]

        return run

    found = {"bare bf16 GEMMs": bare, "fastpost": through(Nf4Linear(weight))}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes as bnb
    except ImportError:
        return found
    stock = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16)
    stock.weight = bnb.nn.Params4bit(
        dense.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to("cpu")
    # Its inference kernel repacks weights, after which training raises.
    stock.support_avx512bf16_for_cpu = False
    return found | {"bitsandbytes": through(stock)}


def measure(outputs: int, inputs: int, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    runs = contenders(outputs, inputs)
    exact = runs["bare bf16 GEMMs"]()
    for name, run in runs.items():
        for found, wanted in zip(run(), exact, strict=True):
            error = (found.float() - wanted.float()).norm() / wanted.float().norm()
            if not error <= 0.01:
                raise RuntimeError(f"{name} at {outputs} x {inputs}: error {error:.1e}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(clock.milliseconds(run))
    floor = min(times["bare bf16 GEMMs"])
    return [
        {
            "outputs": outputs,
            "inputs": inputs,
            "rows": ROWS,
            "implementation": name,
            "fastest_ms": round(min(taken), 3),
            "median_ms": round(statistics.median(taken), 3),
            "over_floor": round(min(taken) / floor, 3),
        }
        for name, taken in times.items()
    ]


def main(rounds: int) -> None:
    """Prints a table and writes bench/results/adapters_nf4.json."""
    threads = torch.get_num_threads()
    name, clock = choose_clock("cpu" if threads == 1 else "wall", torch.device("cpu"))
    results = []
    for shape in SHAPES:
        for row in measure(*shape, rounds, clock):
            print(*(f"{value!s:>16}" for value in row.values()), flush=True)
            results.append(row)
    facts = describe("bench.adapters") | {"clock": name, "threads": threads, "rounds": rounds}
    text = json.dumps(facts | {"results": results}, indent=1)
    (RESULTS / "adapters_nf4.json").write_text(text + "\n")
