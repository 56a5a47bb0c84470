"""Configurations beside one that was asked for: what makes it fit, and which is fastest.

Changes are tried from cheap to dear: those that keep results and cost little time first, then those
that cost time or rounding, then those that train something else, then more GPUs. Each is traced
again, never estimated; where no single change suffices the cheap ones are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

from fastpost.planning.request import Adapter, Request
from fastpost.planning.roofline import Assumptions, predict
from fastpost.planning.trace import Traced

__all__ = ["changes_that_fit", "fastest_that_fits"]

Tracer = Callable[[Request], Traced]

_RANK = 64  # of the adapters that are suggested


def changes_that_fit(request: Request, trace: Tracer, most: int = 3) -> list[tuple[str, Traced]]:
    """The `most` cheapest changes that fit, each in words and traced."""
    found = []
    for words, changed in _changes(request):
        traced = trace(changed)
        if traced.headroom >= 0:
            found.append((words, traced))
        if len(found) == most:
            break
    return found


def fastest_that_fits(request: Request, trace: Tracer, assumptions: Assumptions) -> Traced | None:
    """Of rows at once, checkpointing, offloading and optimizer the predicted fastest that fits.

    Model, method, GPUs, adapter, precision and length stay as they are. None if nothing fits.
    """
    best: tuple[float, Traced] | None = None
    kept = ((False, False), (True, False), (True, True))  # checkpointing, offload
    for optimizer, (checkpointing, offload) in product(
        dict.fromkeys((request.optimizer, "adamw_8bit")), kept
    ):
        rows = 1
        while rows <= 64:
            changed = replace(
                request,
                rows=rows,
                optimizer=optimizer,
                checkpointing=checkpointing,
                offload=offload,
                tokens_per_step=None,
            )
            at_once = changed.num_gpus * changed.row_tokens
            if request.tokens_per_step is not None:
                if request.tokens_per_step % at_once:
                    break
                changed = replace(changed, tokens_per_step=request.tokens_per_step)
            if request.samples and rows * request.num_gpus * changed.accumulation % request.group:
                rows *= 2
                continue
            traced = trace(changed)
            if traced.headroom < 0:
                break
            speed = predict(traced, assumptions).tokens_per_second
            # rounding of states is accepted for a gain in speed only
            if best is None or speed > 1.02 * best[0]:
                best = speed, traced
            rows *= 2
    return None if best is None else best[1]


def _changes(request: Request) -> Iterator[tuple[str, Request]]:
    cheap = dict(_cheap(request))
    yield from cheap.items()
    joined = request
    for changed in cheap.values():
        differing = {
            name: value for name, value in vars(changed).items() if value != getattr(request, name)
        }
        joined = replace(joined, **differing)
    if len(cheap) > 1:
        yield " and ".join(cheap), joined
    if request.adapter is None:
        for kind in ("lora", "qlora"):
            adapter = Adapter(kind, _RANK)
            changed = replace(joined, optimizer_in_backward=False, precision="mixed")
            yield f"--adapter {adapter}", _with_adapter(changed, adapter)
    elif request.adapter.kind != "qlora":
        adapter = Adapter("qlora", request.adapter.rank)
        yield f"--adapter {adapter}", _with_adapter(joined, adapter)
    for times in (2, 4, 8):
        count = times * request.num_gpus
        more = replace(request, num_gpus=count, tokens_per_step=None)
        yield f"--gpus {count}x{request.gpu.name}", more


def _with_adapter(request: Request, adapter: Adapter) -> Request:
    """A model in 4 bits is sampled from itself: a copy of it would be of 16 bits."""
    copied = None if adapter.kind == "qlora" else request.rollout_dtype
    return replace(request, adapter=adapter, rollout_dtype=copied)


def _cheap(request: Request) -> Iterator[tuple[str, Request]]:
    """Changes that train the same weights on the same data."""
    if not request.checkpointing:
        yield "--checkpointing true", replace(request, checkpointing=True)
    if request.checkpointing and not request.offload:
        yield "--offload true", replace(request, offload=True)
    if request.rollout_dtype is not None:
        yield "no --rollout-dtype, to sample from the model", replace(request, rollout_dtype=None)
    if request.rows > 1 and not request.samples:
        yield "--rows 1", replace(request, rows=1)
    if request.accumulation == 1 and not request.optimizer_in_backward and not request.adapter:
        words = "--optimizer-in-backward true"
        yield words, replace(request, optimizer_in_backward=True)
    if request.optimizer != "adamw_8bit":
        yield "--optimizer adamw_8bit", replace(request, optimizer="adamw_8bit")
    if request.precision == "mixed" and request.adapter is None:
        yield "--precision bf16", replace(request, precision="bf16")
