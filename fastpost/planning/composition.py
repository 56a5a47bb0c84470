"""A model of many equal layers from two traces of few.

With n layers, what is alive in a given region (say, while the last layer but one runs backward) is
a + n b bytes: a from outside the layers, b from each. Traces at 4 and 5 layers give both for every
region and category; FLOPs, parameters and collectives likewise. A layer in the middle lies between
the second and the last but one, whose peaks are known, so the largest region holds the peak.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fastpost.planning.ledger import Peak
from fastpost.planning.models import load_config
from fastpost.planning.request import Request
from fastpost.planning.trace import Traced, trace

__all__ = ["trace_composed", "with_layers"]

FEWER, MORE = 4, 5
Key = TypeVar("Key")


def trace_composed(request: Request, config: Any = None, *, on_gpu: bool = True) -> Traced:
    """As `trace`, from models of 4 and 5 layers where all layers are equal and more than 6.

    Raises:
        ValueError: the model is unknown.
    """
    config = load_config(request.model) if config is None else config
    if config.num_hidden_layers <= MORE + 1 or not _has_equal_layers(config):
        return trace(request, config, on_gpu=on_gpu)
    few = trace(request, with_layers(config, FEWER), on_gpu=on_gpu)
    more = trace(request, with_layers(config, MORE), on_gpu=on_gpu)
    extra = config.num_hidden_layers - FEWER

    def number(name: str) -> int:
        first, second = getattr(few, name), getattr(more, name)
        return first + extra * (second - first)

    windows = {
        window: Peak(_extrapolated(peak.held, more.windows[window].held, extra), peak.moment)
        for window, peak in few.windows.items()
        if window in more.windows
    }
    return replace(
        few,
        windows=windows,
        at_rest=_extrapolated(few.at_rest, more.at_rest, extra),
        flops=_extrapolated(few.flops, more.flops, extra),
        gathered=_extrapolated(few.gathered, more.gathered, extra),
        sampled=_extrapolated(few.sampled, more.sampled, extra),
        host_bytes=number("host_bytes"),
        num_parameters=number("num_parameters"),
        num_trained=number("num_trained"),
        trained_bytes=number("trained_bytes"),
        model_bytes=number("model_bytes"),
        seconds=few.seconds + more.seconds,
    )


def with_layers(config: Any, count: int) -> Any:
    """A copy of a configuration with `count` layers."""
    few = copy.deepcopy(config)
    few.num_hidden_layers = count
    if getattr(few, "layer_types", None):
        few.layer_types = few.layer_types[:count]
    if getattr(few, "max_window_layers", None) is not None:
        few.max_window_layers = count
    return few


def _has_equal_layers(config: Any) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ())
    dense = getattr(config, "mlp_only_layers", None) or getattr(config, "first_k_dense_replace", 0)
    return len(kinds) <= 1 and not dense and getattr(config, "decoder_sparse_step", 1) == 1


def _extrapolated(few: Mapping[Key, int], more: Mapping[Key, int], extra: int) -> dict[Key, int]:
    keys = list(dict.fromkeys([*few, *more]))
    return {key: few.get(key, 0) + extra * (more.get(key, 0) - few.get(key, 0)) for key in keys}
