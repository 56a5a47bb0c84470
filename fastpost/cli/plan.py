"""`fastpost plan`: will it fit, how fast, how much; predicted before anything is bought."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpost.cli.recipe import UsageError, convert, did_you_mean

if TYPE_CHECKING:
    from fastpost.planning.planner import Plan
    from fastpost.planning.request import Request
    from fastpost.planning.roofline import Assumptions

USAGE = """usage: fastpost plan --model MODEL [options]

Traces the model, its engine, adapter, sharding and optimizer on tensors without memory and predicts
memory per GPU, FLOPs, time and disk. No weights, no network, no GPU.

  --model MODEL          an id with a bundled configuration (--list), a config.json, or a folder
  --method METHOD        sft (default), dpo, kto, orpo, cpo, simpo, reward, grpo, rloo
  --gpus COUNTxNAME      such as 8xH100-80GB (default 1xH100-80GB)
  --seq N                tokens of a row (default 8192)
  --rows N               rows a GPU computes at once: of DPO pairs, of GRPO completions (default 1)
  --prompt SHARE         of a row that is prompt, for all but sft (default 0.5)
  --group N              completions of a prompt, for grpo and rloo (default 8)
  --beta N               weight of the reference, for grpo (default 0) and rloo (default 0.05)
  --rollout-dtype NAME   sample from a copy: bfloat16, float16, float32; without it from the model
  --tokens-per-step N    of an optimizer step over all GPUs; batches are accumulated
  --adapter KIND:RANK    lora, dora, qlora; without it all weights are trained
  --optimizer NAME       adamw (default), adamw_8bit
  --precision NAME       mixed (default): trained weights in fp32, computed in bf16; bf16; fp32
  --checkpointing BOOL   recompute each layer in the backward (default true)
  --offload BOOL         what checkpointing keeps waits in host memory (default false)
  --optimizer-in-backward BOOL   update each layer in the backward, without clipping (default false)
  --mlp-tile-tokens N    compute so many tokens of an MLP at a time (default all)
  --memory-budget-gb N   workspace of the language-model head
  --train-tokens N       of the whole training, to predict hours and money
  --auto FILE            find the rows, checkpointing, offloading and optimizer that are predicted
                         to be fastest and fit, and write them as a recipe for
                         `fastpost METHOD --config FILE`
  --whole                trace every layer instead of composing equal ones
  --json                 prints JSON
  --list                 prints the bundled models and the known GPUs

assumptions of the prediction of time:
  --reached SHARE, --link-reached SHARE, --overlap SHARE, --host-link GB/s
  --gpu-memory-gb, --reserve-gb (not for tensors), --tflops, --bandwidth, --link, --price
                         of the GPU (GiB, GiB, 10^12/s, GB/s, GB/s, dollars an hour)"""

_SWITCHES = ("json", "whole", "list")
_GPU_FIELDS = {"tflops": "tflops", "bandwidth": "bandwidth", "link": "link", "price": "price"}
_GIB_FIELDS = {"gpu_memory_gb": "memory", "reserve_gb": "reserve"}
_ASSUMED = ("reached", "link_reached", "overlap", "host_link")
_NUMBERS: dict[str, Any] = {
    "seq": int,
    "rows": int,
    "prompt": float,
    "group": int,
    "tokens_per_step": int,
    "beta": float,
    "checkpointing": bool,
    "offload": bool,
    "optimizer_in_backward": bool,
    "mlp_tile_tokens": int,
    "memory_budget_gb": float,
    "train_tokens": float,
    **dict.fromkeys((*_GPU_FIELDS, *_GIB_FIELDS, *_ASSUMED), float),
}
_TEXTS = (
    "auto", "model", "method", "gpus", "adapter", "optimizer", "precision", "rollout_dtype"
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code: 1 where the configuration does not fit."""
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    given = _flags(argv)
    if "list" in given:
        print(_list())
        return 0
    from fastpost.planning.planner import fastest, plan  # heavy

    whole = "whole" in given
    try:
        request, assumptions = _request(given), _assumptions(given)
        if "auto" in given:
            request = fastest(request, assumptions=assumptions, whole=whole) or request
        found = plan(
            request,
            assumptions=assumptions,
            train_tokens=given.get("train_tokens"),
            whole=whole,
            suggest=True,
        )
        if "auto" in given and found.fits:
            _write_recipe(given["auto"], found)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if "json" in given:
        print(json.dumps(found.as_dict(), indent=2))
        return int(not found.fits)
    print(found.text())
    _print_ending(found, given.get("auto"))
    return int(not found.fits)


def _print_ending(found: Plan, file: str | None) -> None:
    """What helps where it does not fit, or where the recipe went."""
    from fastpost.planning.report import settings, verdict
    from fastpost.planning.roofline import predict

    if not found.fits:
        changes = found.changes
        print("\nChanges that make it fit, each traced again:" if changes else "\nNothing fits.")
        for words, other in changes:
            speed = predict(other, found.assumptions).tokens_per_second
            print(f"  {words}\n    {verdict(other)}; predicted {speed:,.0f} tokens/s")
    elif file is not None:
        print(f"\nWritten to {file}: {settings(found.traced)}")


def _write_recipe(path: str, found: Plan) -> None:
    from fastpost.planning.recipe import recipe_text

    try:
        Path(path).write_text(recipe_text(found.traced, found.predicted), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--auto {path}: {error.strerror}") from None


def _flags(argv: list[str]) -> dict[str, Any]:
    """Flag name, with underscores, to its value."""
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        known = (*_TEXTS, *_NUMBERS, *_SWITCHES)
        if not word.startswith("--") or name not in known:
            raise UsageError(f"unknown option {word!r}.{did_you_mean(name, known)}")
        if name in given:
            raise UsageError(f"{word} is given twice")
        if name in _SWITCHES:
            given[name] = True
            continue
        if not has_value:
            if not words:
                raise UsageError(f"{word} needs a value")
            value = words.pop(0)
        try:
            given[name] = convert(value, _NUMBERS[name]) if name in _NUMBERS else value
        except ValueError as error:
            raise UsageError(f"{word}: {error}") from None
    if "model" not in given and "list" not in given:
        raise UsageError("--model is missing; fastpost plan --list names the bundled ones")
    return given


def _request(given: dict[str, Any]) -> Request:
    from fastpost.planning.request import Adapter, Request, parse_gpus

    count, gpu = parse_gpus(given.get("gpus", "H100-80GB"))
    figures = {field: given[name] for name, field in _GPU_FIELDS.items() if name in given}
    for name, field in _GIB_FIELDS.items():
        if name in given:
            figures[field] = int(given[name] * 2**30)
    names = {field.name for field in dataclasses.fields(Request)}
    values = {name: value for name, value in given.items() if name in names}
    if "adapter" in values:
        values["adapter"] = Adapter.parse(values["adapter"])
    return Request(**values, gpu=dataclasses.replace(gpu, **figures), num_gpus=count)


def _assumptions(given: dict[str, Any]) -> Assumptions:
    from fastpost.planning.roofline import Assumptions

    return Assumptions(**{name: given[name] for name in _ASSUMED if name in given})


def _list() -> str:
    from fastpost.planning.hardware import GPUS
    from fastpost.planning.models import bundled_models

    return "\n".join(["models:", *bundled_models(), "", "GPUs:", *GPUS])
