"""Tells the tracer which decoder layer runs, forward and backward.

    "embedding"   before the first layer, and behind it in the backward
    "layer 0"     layers count from the first; the last two are "layer -2" and "layer -1"
    "head"        from the last norm to the loss, and back

Peaks are kept apart by region, which is what lets models of few layers be composed to one of many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpost.planning.tracer import Tracer
from fastpost.sharding import decoder_layers

__all__ = ["follow_layers"]


def follow_layers(model: Any, tracer: Tracer) -> None:
    """Hook every layer of a model, for as long as the model lives."""
    layers = decoder_layers(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _mark(base.get_input_embeddings(), "embedding", tracer)
    for i, layer in enumerate(layers):
        from_end = i - len(layers)
        name = f"layer {from_end if from_end >= -2 else i}"
        _mark(layer, name, tracer)
    norm = getattr(base.base_model, "norm", None)
    if norm is not None:
        _mark(norm, "head", tracer)


def _mark(module: nn.Module, region: str, tracer: Tracer) -> None:
    def enter(*_: Any) -> None:
        tracer.region = region

    def leave(_: Any, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad and torch.is_grad_enabled():
            first.register_hook(enter)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
