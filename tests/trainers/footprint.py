"""Everything a run leaves behind, in facets, so that two runs can be compared for what differs.

An option is consumed if a run with it leaves another footprint than one without. The facet in
which the two must part is named by the test, because "something differs" would be true of a run
that an unrelated accident disturbed.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
import transformers

# Relative change of a number below which two runs count as equal: sums in another order.
_NOISE = 1e-5
_CLOCKS = ("time", "per_second", "flos")


@dataclass
class Watch:
    """What a policy and its reference are asked while their trainer is made and runs."""

    forwards: list[torch.Tensor] = field(default_factory=list)
    layers: int = 0
    batches: list[Any] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def follow(self, model: Any) -> None:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, torch.Tensor):
                self.forwards.append(ids.detach().clone())

        def count(module: Any, args: Any) -> None:
            self.layers += 1

        layers = next(m for n, m in model.named_modules() if n.endswith("layers") and len(m))
        self.handles += [
            model.register_forward_pre_hook(note, with_kwargs=True),
            # Below the layer itself: a recomputed layer runs without its own hooks.
            *(next(layer.children()).register_forward_pre_hook(count) for layer in layers),
        ]


def run(
    trainer: Any, watch: Watch, calls: Sequence[Any] = (), printed: io.StringIO | None = None
) -> dict[str, Any]:
    """Train and describe.

    Returns:
        Facets: `loss`, `metrics` (all logged numbers without clocks), `gradients` of the first
        step after clipping, `weights` at the end, `batches` (what the training step was given),
        `forwards` (token ids the watched models saw), `layers` (runs of their layers),
        `engine` (its settings and token counts), `files` written, `calls` of libraries below,
        `printed` text.
    """
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, *rest: Any) -> Any:
        watch.batches.append(_detached(inputs))
        return step(model, inputs, *rest)

    trainer.training_step = training_step
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed or io.StringIO()):
        warnings.simplefilter("ignore")
        trainer.train()
    for handle in watch.handles:
        handle.remove()
    return describe(trainer, watch, calls, printed)


def describe(
    trainer: Any, watch: Watch, calls: Sequence[Any], printed: io.StringIO | None
) -> dict[str, Any]:
    engine = trainer.engine
    folder = Path(trainer.args.output_dir)
    trace = trainer.trace
    text = printed.getvalue() if printed else ""
    return {
        "loss": trace.losses,
        "metrics": [
            {k: v for k, v in logs.items() if not any(clock in k for clock in _CLOCKS)}
            for logs in trainer.state.log_history
        ],
        "gradients": trace.gradients,
        "weights": trace.weights,
        "batches": watch.batches,
        "forwards": watch.forwards,
        "layers": watch.layers,
        "engine": {
            "stats": vars(engine.stats).copy(),
            "prefix_sharing": engine.prefix_sharing,
            "head": {
                name: str(getattr(getattr(engine, "head", None), name, None))
                for name in ("memory_budget", "temperature", "in_fp32")
            },
        },
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()),
        "calls": list(calls),
        # Metrics are logged as Python dictionaries; they are compared as numbers above.
        "printed": [line for line in text.splitlines() if not line.startswith("{'")],
    }


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Any]]:
    """Arguments that only libraries below can honour, as they arrive there."""
    calls: list[Any] = []
    dataset_map, load = datasets.Dataset.map, transformers.PreTrainedModel.from_pretrained.__func__
    load_tokenizer = transformers.AutoTokenizer.from_pretrained

    def map_rows(self: Any, *args: Any, num_proc: Any = None, **kwargs: Any) -> Any:
        calls.append(("map", num_proc))  # recorded, then run in this process
        return dataset_map(self, *args, **kwargs)

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(("model", kwargs.get("trust_remote_code"), str(kwargs.get("dtype"))))
        return load(cls, *args, **kwargs)

    def tokenizer_from_pretrained(*args: Any, **kwargs: Any) -> Any:
        calls.append(("tokenizer", kwargs.get("trust_remote_code")))
        return load_tokenizer(*args, **kwargs)

    with (
        mock.patch.object(datasets.Dataset, "map", map_rows),
        mock.patch.object(
            transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained)
        ),
        mock.patch.object(transformers.AutoTokenizer, "from_pretrained", tokenizer_from_pretrained),
    ):
        yield calls


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Names of the facets in which two footprints differ."""
    return {name for name in one if not _equal(one[name], other[name])}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.is_floating_point():
            return torch.equal(a, b)
        return bool((a - b).norm() <= _NOISE * a.norm() + 1e-9)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= _NOISE * max(abs(a), abs(b)) + 1e-9
    return bool(a == b)


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _detached(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_detached(v) for v in value]
    return value
