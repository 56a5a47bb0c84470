"""prefix_attention against PyTorch's attention over the padded batch, at SmolLM2's shape in bf16.

    python -m bench.ops attention
    python -m pytest bench/ops/bench_prefix_attention.py --benchmark-group-by=group

The peer is what transformers runs for the same rows: `scaled_dot_product_attention` with GQA where
all rows have one length, with repeated keys and a mask where they are padded. It gets its copies of
shared prefixes for nothing. The floor is seven bare GEMMs of the visible pairs into reused buffers:
two products forward, five backward.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.ops.contender import Case, Contender, Results, forward_backward
from fastpost_kernels import _flash_varlen, prefix_attention, reference

HEADS, KEY_HEADS, HEAD_SIZE = 9, 3, 64
DTYPE = torch.bfloat16
NAMES = ("query", "key", "value")


class Workload(NamedTuple):
    """Groups of rows with one shared prefix each: (prefix tokens, tokens of each answer)."""

    groups: list[tuple[int, list[int]]]

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

    def rows(self) -> Iterator[list[int]]:
        """Tokens of each padded row: its prefix, shared with others, and its answer."""
        start = 0
        for prefix, answers in self.groups:
            shared, start = list(range(start, start + prefix)), start + prefix
            for answer in answers:
                yield shared + list(range(start, start + answer))
                start += answer


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


def _bare_gemms(workload: Workload, device: Any) -> Callable[[], Results]:
    """Of every segment, 7 products with the keys it sees: its ancestors', and half of its own."""
    shapes, depth = [], 0
    for start, end, subtree_end in workload.segments.tolist():
        depth = depth if subtree_end == end else 0  # a prefix is a root
        shapes.append((end - start, depth + (end - start + 1) // 2))
        depth = end - start if subtree_end > end else depth

    def random_heads(*shape: int) -> Tensor:
        return torch.randn(HEADS, *shape, device=device).to(DTYPE)

    longest, widest = (max(sizes) for sizes in zip(*shapes, strict=True))
    queries, keys = random_heads(longest, HEAD_SIZE), random_heads(widest, HEAD_SIZE)
    pairs = random_heads(longest * widest)
    scores, outputs, sums = (torch.empty_like(x) for x in (pairs, queries, keys))

    def run() -> Results:
        for rows, cols in shapes:
            q, k, out, back = queries[:, :rows], keys[:, :cols], outputs[:, :rows], sums[:, :cols]
            p, into = (x[:, : rows * cols].view(HEADS, rows, cols) for x in (pairs, scores))
            for _ in range(3):  # q k^T twice, dO v^T
                torch.bmm(q, k.mT, out=into)
            for _ in range(2):  # p v, dz k
                torch.bmm(p, k, out=out)
            for _ in range(2):  # p^T dO, dz^T q
                torch.bmm(p.mT, q, out=back)
        return {}

    return run


def _padded(workload: Workload, packed: dict[str, Tensor], grad: Tensor) -> Contender:
    """SDPA over rows gathered from packed tokens; a token's gradient enters at its first copy."""
    rows = list(workload.rows())
    longest = max(map(len, rows))
    device = grad.device
    is_padding = torch.tensor([[t >= len(row) for t in range(longest)] for row in rows])
    index = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    seen: set[int] = set()
    first = torch.tensor(
        [[t < len(r) and r[t] not in seen and not seen.add(r[t]) for t in range(longest)]
         for r in rows], device=device
    )  # fmt: skip

    def padded(x: Tensor) -> Tensor:  # [heads, N, D] -> [B, heads, longest, D]
        return x[:, index].transpose(0, 1).detach()

    def packed_again(x: Tensor, keep: Tensor) -> Tensor:
        """Sums over the copies where `keep`."""
        out = torch.zeros(grad.shape[1], x.shape[1], HEAD_SIZE, device=device, dtype=torch.float32)
        return out.index_add_(0, index[keep], x.transpose(1, 2)[keep].float()).transpose(0, 1)

    def unpack(found: Results) -> Results:
        real = ~is_padding.to(device)
        output = packed_again(found["output"], first)
        return {"output": output} | {
            name: packed_again(found[name], real) for name in found if name != "output"
        }

    inputs = {name: padded(x).requires_grad_() for name, x in packed.items()}
    padded_grad = padded(grad) * first[:, None, :, None]
    if not is_padding.any():
        run = forward_backward(_causal, inputs, padded_grad)
        return Contender("torch SDPA, padded", run, unpack=unpack)
    present = ~is_padding.to(device)
    mask = present[:, None, None, :] & torch.ones_like(present[0]).new_ones(longest, longest).tril()

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeated = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
        return scaled_dot_product_attention(query, *repeated, attn_mask=mask)

    run = forward_backward(masked, inputs, padded_grad)
    return Contender("torch SDPA, padded", run, unpack=unpack)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _specification(
    inputs: dict[str, Tensor], segments: Tensor, grad: Tensor
) -> Callable[[], Results]:
    """The reference under autograd, one head of keys at a time: its scores are dense."""
    group = HEADS // KEY_HEADS

    def run() -> Results:
        parts = []
        for head in range(KEY_HEADS):
            heads = slice(head * group, (head + 1) * group)
            taken = (heads, slice(head, head + 1), slice(head, head + 1))
            some = {
                name: inputs[name].detach()[part].requires_grad_()
                for name, part in zip(NAMES, taken, strict=True)
            }
            program = forward_backward(
                lambda query, key, value: reference.prefix_attention(query, key, value, segments),
                some,
                grad[heads],
            )
            parts.append(program())
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return run


def case(name: str, device: str | torch.device = "cpu", workload: Workload | None = None) -> Case:
    """Everything that competes for one of WORKLOADS, or for a workload of another name."""
    torch.manual_seed(0)
    workload = workload or WORKLOADS[name]
    segments = workload.segments
    tokens = int(segments[-1, 1])
    packed = {
        label: torch.randn(tokens, heads, HEAD_SIZE, device=device).to(DTYPE).transpose(0, 1)
        for label, heads in zip(NAMES, (HEADS, KEY_HEADS, KEY_HEADS), strict=True)
    }
    grad = torch.randn(tokens, HEADS, HEAD_SIZE, device=device).to(DTYPE).transpose(0, 1)
    inputs = {label: x.requires_grad_() for label, x in packed.items()}
    exact = {label: x.detach().double() for label, x in packed.items()}

    def ours(backend: str) -> Callable[[], Results]:
        return forward_backward(
            lambda query, key, value: prefix_attention(
                query, key, value, segments, backend=backend
            ),
            inputs,
            grad,
        )

    contenders = [
        Contender("7 bare GEMMs", _bare_gemms(workload, device), is_floor=True),
        Contender("fastpost", ours("auto")),
        Contender("fastpost torch", ours("torch")),
        _padded(workload, packed, grad),
    ]
    if _flash_varlen.unavailable_reason(grad, HEAD_SIZE) is None:
        contenders.append(Contender("fastpost flash", ours("flash")))
    return Case(
        "prefix attention",
        f"{name}: {tokens} of {sum(map(len, workload.rows()))} tokens",
        _specification(exact, segments, grad.double()),
        _specification(inputs, segments, grad),
        tuple(contenders),
    )


def cases(device: str | torch.device = "cpu") -> list[Case]:
    """All workloads; their shape is SmolLM2-135M's."""
    return [case(name, device) for name in WORKLOADS]


_case = lru_cache(maxsize=1)(case)


@pytest.mark.parametrize(
    "side", ["7 bare GEMMs", "fastpost", "fastpost torch", "torch SDPA, padded"]
)
@pytest.mark.parametrize("name", WORKLOADS)
def test_forward_and_backward(benchmark: Any, name: str, side: str) -> None:
    found = _case(name)
    named = {contender.name: contender for contender in found.contenders}
    benchmark.group = f"{found.op}: {found.shape}"
    benchmark.pedantic(named[side].run, rounds=15, warmup_rounds=2)
