"""prefix_attention against PyTorch's attention over the padded batch, at SmolLM2's shape in bf16.

    python -m pytest bench/ops/bench_prefix_attention.py --benchmark-group-by=group

The peer is what transformers runs for the same rows: `scaled_dot_product_attention` with GQA where
all rows have one length, with repeated keys and a mask where they are padded. `extra_info` holds
the tokens each side processes and the FLOPs of the visible pairs, the floor of both.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from fastpost_kernels import prefix_attention

HEADS, KEY_HEADS, HEAD_SIZE = 9, 3, 64
DTYPE = torch.bfloat16


class Workload(NamedTuple):
    """Groups of rows with one shared prefix each: (prefix tokens, tokens of each answer)."""

    groups: list[tuple[int, list[int]]]

    @property
    def row_lengths(self) -> list[int]:
        return [prefix + answer for prefix, answers in self.groups for answer in answers]

    @property
    def segments(self) -> Tensor:
        rows, start = [], 0
        for prefix, answers in self.groups:
            end = start + prefix + sum(answers)
            if prefix:
                rows.append((start, start + prefix, end))
                start += prefix
            for answer in answers:
                rows.append((start, start + answer, start + answer))
                start += answer
        return torch.tensor(rows)


def _lengths(count: int, low: int, high: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(low, high) for _ in range(count)]


WORKLOADS = {
    "16 rows of 160": Workload([(0, [160] * 16)]),
    "16 rows of 60-160": Workload([(0, [160, *_lengths(15, 60, 160, 0)])]),
    "DPO, 8 pairs": Workload([(90, _lengths(2, 30, 100, i)) for i in range(8)]),
    "GRPO, 2 prompts x 8": Workload([(200, _lengths(8, 60, 150, i)) for i in range(2)]),
    "GRPO, 1 long prompt x 8": Workload([(1000, _lengths(8, 100, 200, 0))]),
}

Run = Callable[[], Tensor]


def _ours(workload: Workload) -> tuple[Run, list[Tensor], int]:
    segments = workload.segments
    num_tokens = int(segments[-1, 1])
    inputs = [
        torch.randn(num_tokens, heads, HEAD_SIZE, dtype=DTYPE).transpose(0, 1).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    return lambda: prefix_attention(*inputs, segments), inputs, num_tokens


def _sdpa(workload: Workload) -> tuple[Run, list[Tensor], int]:
    lengths = torch.tensor(workload.row_lengths)
    batch, longest = len(lengths), int(lengths.max())
    inputs = [
        torch.randn(batch, longest, h, HEAD_SIZE, dtype=DTYPE).transpose(1, 2).requires_grad_()
        for h in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    query, key, value = inputs
    if bool((lengths == longest).all()):
        return (
            lambda: scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True),
            inputs,
            batch * longest,
        )
    present = torch.arange(longest) < lengths[:, None]
    mask = present[:, None, None, :] & torch.ones(longest, longest, dtype=torch.bool).tril()
    groups = HEADS // KEY_HEADS

    def run() -> Tensor:
        repeated = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return scaled_dot_product_attention(query, *repeated, attn_mask=mask)

    return run, inputs, batch * longest


SIDES = {"ours": _ours, "sdpa": _sdpa}


def _visible_flops(workload: Workload) -> int:
    run, _, _ = _ours(workload)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_forward(benchmark, name, side):
    torch.manual_seed(0)
    run, _, num_tokens = SIDES[side](WORKLOADS[name])
    benchmark.group = f"prefix_attention forward: {name}"
    benchmark.extra_info |= {"tokens": num_tokens, "flops": _visible_flops(WORKLOADS[name])}
    with torch.no_grad():
        benchmark.pedantic(run, rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_forward_and_backward(benchmark, name, side):
    torch.manual_seed(0)
    run, inputs, num_tokens = SIDES[side](WORKLOADS[name])
    grad_out = torch.randn_like(run())
    benchmark.group = f"prefix_attention forward and backward: {name}"
    # The backward's five products to the forward's two.
    flops = _visible_flops(WORKLOADS[name]) * 7 // 2
    benchmark.extra_info |= {"tokens": num_tokens, "flops": flops}
    benchmark.pedantic(
        lambda: torch.autograd.grad(run(), inputs, grad_out), rounds=15, warmup_rounds=2
    )
