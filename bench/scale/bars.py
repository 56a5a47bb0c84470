"""What was promised of 32B and 70B, each traced and printed as met or missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.scale.cases import Case
from bench.scale.lengths import Row, as_batch, uniform_rows
from bench.scale.longest import longest_that_fits
from bench.scale.sides import activation_bytes, ours, peak_of_step, stock
from fastpost.planning.models import load_config
from fastpost.planning.request import Request

__all__ = ["BARS", "Verdict", "row_batch", "tile_tokens"]

GIB = 2**30


@dataclass(frozen=True)
class Verdict:
    """A bar, what was traced, and whether that meets it."""

    bar: str
    found: str
    met: bool


def tile_tokens(row: int) -> int:
    """Tokens of an MLP at once, where MLPs are tiled: 16K, or an eighth of a longer row."""
    return max(16_384, -(-row // 8))


def row_batch(request: Request, rows: list[Row]) -> Any:
    """The batch of `rows` in tokens of the request's model."""
    return as_batch(request.method, rows, load_config(request.model).vocab_size)


def _full(model: str) -> list[Verdict]:
    request = Case(model, "sft", "full").request(8192)
    traced = ours(request, row_batch(request, [Row(0, 1, 8191)]))
    peak, usable = peak_of_step(traced), request.gpu.usable
    found = f"peak {peak.total / GIB:.1f} of {usable / GIB:.1f} GiB ({_held(peak.held)})"
    bar = f"{model} full SFT, 8K tokens a GPU, 8 x 80 GB, nothing offloaded: fits"
    return [Verdict(bar, found, peak.total <= usable)]


def _qlora() -> list[Verdict]:
    case, least = Case("70B", "sft", "QLoRA"), 150_016
    request = case.request(offload=True)
    traces = {}

    def run(tokens: int) -> Any:
        tiled = replace(request, mlp_tile_tokens=tile_tokens(tokens))
        traces[tokens] = ours(tiled, row_batch(request, [Row(0, 1, tokens - 1)]))
        return traces[tokens]

    usable = request.gpu.usable
    longest = longest_that_fits(run, usable, (least // 2, least))
    peak = peak_of_step(traces[least])
    found = (
        f"{longest.tokens:,} tokens; at {least:,} {peak.total / GIB:.1f} of {usable / GIB:.1f} GiB "
        f"({_held(peak.held)}; {traces[least].host_bytes / GIB:.0f} GiB of host memory)"
    )
    bar = "70B QLoRA, one 80 GB GPU, checkpoints in host memory, MLPs tiled: 150K tokens or more"
    return [Verdict(bar, found, longest.tokens >= 150_000)]


def _dpo() -> list[Verdict]:
    case = Case("32B", "dpo", "LoRA")
    rows = uniform_rows("dpo", 4, 2, 512, 256)
    request = case.request(768)
    batch = row_batch(request, rows)
    theirs, plain = stock(request, batch), ours(request, batch)
    tiled = ours(replace(request, mlp_tile_tokens=1024, memory_budget_gb=0.02), batch)
    offloaded = ours(case.request(768, offload=True), batch)
    flops = plain.total_flops / theirs.total_flops
    name = "DPO 32B LoRA, prompt 512, answers 256"
    found = [Verdict(f"{name}: FLOPs at most 0.7 of TRL's", f"{flops:.3f}", flops <= 0.7)]
    flops = tiled.total_flops / theirs.total_flops
    bar = f"{name}, MLPs in tiles of 1,024, a head of 20 MiB: FLOPs at most 0.7 of TRL's"
    found.append(Verdict(bar, f"{flops:.3f}", flops <= 0.7))
    ways = (
        (plain, "checkpoints on the GPU"),
        (tiled, "checkpoints on the GPU, MLPs in tiles of 1,024, a head of 20 MiB"),
        (offloaded, "checkpoints in host memory"),
    )
    for traced, how in ways:
        share = activation_bytes(traced) / activation_bytes(theirs)
        of = f"{activation_bytes(traced) / GIB:.2f} of {activation_bytes(theirs) / GIB:.2f} GiB"
        bar = f"{name}, {how}: activations and head at most 0.6 of TRL's"
        found.append(Verdict(bar, f"{share:.3f} ({of})", share <= 0.6))
    return found


def _grpo() -> list[Verdict]:
    request = Case("32B", "grpo", "LoRA").request(1536)
    batch = row_batch(request, uniform_rows("grpo", 1, 8, 1024, 512))
    share = ours(request, batch).total_flops / stock(request, batch).total_flops
    bar = "GRPO 32B LoRA, G 8, prompt 1,024, answers 512: FLOPs at most 0.5 of TRL's"
    return [Verdict(bar, f"{share:.3f}", share <= 0.5)]


def _held(held: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in held.items() if size > GIB // 20)


BARS: dict[str, Callable[[], list[Verdict]]] = {
    "QLoRA 70B": _qlora,
    "full 32B": lambda: _full("32B"),
    "full 70B": lambda: _full("70B"),
    "DPO 32B": _dpo,
    "GRPO 32B": _grpo,
}
