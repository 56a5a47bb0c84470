"""What a worker of `python -m bench.scale` traces: a row of the table, a longest row, a bar."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import datasets
import torch

from bench.scale.bars import BARS, row_batch, tile_tokens
from bench.scale.cases import Case
from bench.scale.lengths import IGNORE_INDEX, Row
from bench.scale.longest import longest_that_fits
from bench.scale.sides import ours, stock, summary

__all__ = ["WAYS", "bar", "compare", "longest", "quiet", "timed"]

WAYS = ("TRL", "ours", "ours, offloaded and tiled")


def quiet() -> None:
    """One thread a process, and none of the peers' advice between the rows."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)


def timed(job: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a job returns, and the seconds of a processor that it took."""
    began = time.process_time()
    return job(*arguments), time.process_time() - began


def compare(case: Case) -> dict[str, Any]:
    """One row of the table."""
    request = case.request()
    batch = row_batch(request, case.rows())
    found = {"ours": summary(ours(request, batch)), "TRL": summary(stock(request, batch))}
    return {
        **asdict(case),
        "gpus": request.num_gpus,
        "padded_tokens": batch["input_ids"].numel(),
        "scored_tokens": int((batch["labels"] != IGNORE_INDEX).sum()),
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
        tiles = tile_tokens(tokens) if is_far else None
        return ours(replace(request, mlp_tile_tokens=tiles), batch)

    start = (32_768, 65_536) if is_far else (4096, 16_384)
    found = longest_that_fits(run, request.gpu.usable, start)
    return {"model": model, "adapter": adapter, "way": way, **asdict(found)}


def bar(name: str) -> list[dict[str, Any]]:
    """What was traced for one of `BARS`."""
    return [asdict(verdict) for verdict in BARS[name]()]
