"""The weight gradient of `linear` against the library's own, at SmolLM2's shapes in bf16.

    python -m pytest bench/ops/bench_linear.py --benchmark-group-by=group

The floor of both is the product alone on an operand that is transposed already. `extra_info` holds
the FLOPs of one gradient.
"""

from __future__ import annotations

import importlib

import pytest
import torch

weight_gradient = importlib.import_module("fastpost_kernels.linear").weight_gradient

ROWS = (1300, 3000)
# (inputs, outputs): gate and up, down, keys and values
WEIGHTS = ((576, 1536), (1536, 576), (576, 192))
SIDES = ("ours", "library", "floor")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_weight_gradient(benchmark, rows, weight, side):
    torch.manual_seed(0)
    inputs, outputs = weight
    grad, x = torch.randn(rows, outputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    turned = grad.t().contiguous()
    run = {
        "ours": lambda: weight_gradient(grad, x),
        "library": lambda: grad.t() @ x,
        "floor": lambda: turned @ x,
    }[side]
    benchmark.group = f"weight gradient: {rows} rows, {inputs} to {outputs}"
    benchmark.extra_info |= {"flops": 2 * rows * inputs * outputs}
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
