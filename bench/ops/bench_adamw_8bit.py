"""An optimizer step: `AdamW8bit` beside torch's fused AdamW and bitsandbytes' AdamW8bit.

    python -m bench.ops optimizer --widths 576
    python -m bench.ops.bench_adamw_8bit --width 576 --layers 4 --threads 1 --clock cpu
    python -m pytest bench/ops/bench_adamw_8bit.py --benchmark-group-by=group

The parameters are those of a Llama's layers. Held: weights, gradients and states, counted from the
tensors after the first step. The floor reads and writes our bytes and does nothing else. In
`bench.ops` the weights after the first step are checked against AdamW's in float64.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench.ops.contender import Case, Contender, Results
from bench.ops.measuring import CLOCKS, choose_clock
from fastpost_kernels import AdamW8bit

__all__ = ["CONTENDERS", "Step", "case", "parameters"]

FP32, BF16 = torch.float32, torch.bfloat16
LAYERS = 4


class Step(NamedTuple):
    """One optimizer with gradients in place; `run` is a step."""

    run: Callable[[], Any]
    held: int  # bytes of weights, gradients and states
    elements: int


def parameters(width: int, layers: int, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Four projections, a gated MLP of 8/3 the width and two norms a layer; values of bf16."""
    inner = 8 * width // 3 // 64 * 64
    shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)] + [(width,)] * 2
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes * layers:
        param = nn.Parameter(torch.randn(shape, generator=generator).to(BF16).to(device, dtype))
        grad = 1e-3 * torch.randn(shape, generator=generator)
        param.grad = grad.to(BF16).to(device, dtype)
        found.append(param)
    return found


def _step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> Step:
    optimizer.step()
    states = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    maps = {x.data_ptr(): x for x in states}  # bitsandbytes' tables are shared
    held = [*params, *(p.grad for p in params if p.grad is not None), *maps.values()]
    return Step(optimizer.step, sum(x.nbytes for x in held), sum(param.numel() for param in params))


def _ours(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return AdamW8bit(params, lr=lr)


def _to_nearest(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return AdamW8bit(params, lr=lr, stochastic_rounding=False)


def _fused(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, fused=True)


def _bitsandbytes(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit as Peer

    return Peer(params, lr=lr, weight_decay=1e-2)  # type: ignore[no-any-return]


CONTENDERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], torch.dtype]] = {
    "fastpost, bf16": (_ours, BF16),
    "fastpost, bf16 to nearest": (_to_nearest, BF16),
    "fastpost, fp32": (_ours, FP32),
    "torch fused, fp32": (_fused, FP32),
    "torch fused, bf16": (_fused, BF16),
    "bitsandbytes 8-bit, bf16": (_bitsandbytes, BF16),
    "bitsandbytes 8-bit, fp32": (_bitsandbytes, FP32),
}


def contender(name: str, width: int, layers: int, device: str = "cpu") -> Step:
    make, dtype = CONTENDERS[name]
    params = parameters(width, layers, dtype, device)
    return _step(make(params, 1e-5), params)


def _bytes_alone(elements: int, device: str | torch.device = "cpu") -> Callable[[], Results]:
    """10 bytes an element: 6 read and 4 written by copies of bytes."""
    read, written = (torch.ones(5 * elements, dtype=torch.uint8, device=device) for _ in range(2))

    def run() -> Results:
        written.copy_(read)
        return {}

    return run


def case(width: int, device: str | torch.device = "cpu", layers: int = LAYERS) -> Case:
    """All optimizers on the same weights and gradients, at a rate at which bf16 sees a step."""
    device = str(device)

    def step_of(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> Any:
        params = parameters(width, layers, dtype, device)
        made: list[torch.optim.Optimizer] = []

        def run() -> Results:
            if not made:  # a peer that is not installed fails here, and gets a row
                made.append(make(params, 0.1))
            made[0].step()
            return {str(i): param.detach() for i, param in enumerate(params)}

        return run

    def flat(found: Results) -> Results:
        return {"weights": torch.cat([x.flatten() for x in found.values()])}

    def plain(dtype: torch.dtype) -> Callable[[], Results]:
        return lambda: flat(step_of(lambda p, lr: torch.optim.AdamW(p, lr=lr), dtype)())

    elements = sum(p.numel() for p in parameters(width, layers, BF16, "cpu"))
    return Case(
        "AdamW step",
        f"{elements} parameters",
        plain(torch.float64),
        plain(BF16),
        (
            Contender("its bytes alone", _bytes_alone(elements, device), is_floor=True),
            *(
                Contender(name, step_of(make, dtype), unpack=flat)
                for name, (make, dtype) in CONTENDERS.items()
            ),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name, clock = choose_clock(options.clock, torch.device(options.device))
    steps = {
        key: contender(key, options.width, options.layers, options.device) for key in CONTENDERS
    }
    if options.device == "cpu":
        ours = steps["fastpost, bf16"]
        steps["floor: our bytes copied"] = ours._replace(run=_bytes_alone(ours.elements))
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(options.rounds):
        for key, step in steps.items():
            times[key].append(clock.milliseconds(step.run))
    elements = next(iter(steps.values())).elements
    print(f"{elements:,} parameters, {options.threads} threads, {name} clock, medians")
    print(f"  {'':<28}{'ns/parameter':>14}{'bytes held/parameter':>22}")
    for key, step in steps.items():
        nanoseconds = 1e6 * statistics.median(times[key]) / elements
        print(f"  {key:<28}{nanoseconds:>14.3f}{step.held / elements:>22.2f}")


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("width", [576, 1024])
def test_step(benchmark: Any, width: int, name: str) -> None:
    step = contender(name, width, 2)
    benchmark.group = f"AdamW, {step.elements} parameters"
    benchmark.pedantic(step.run, rounds=10, warmup_rounds=2)


if __name__ == "__main__":
    main()
