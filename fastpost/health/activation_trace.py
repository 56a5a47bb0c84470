"""The first module whose output is not finite although its inputs are.

Hooks on every module keep, per call, one number for the inputs and one for the outputs, on the
device; they are read only when a step went wrong. Modules report when they return, children before
their parents, so the first culprit in that order is the innermost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpost.health.gradient_census import largest_magnitude


class ActivationTrace:
    """Forward hooks on every module of a model.

    A module with a culprit inside has finite inputs and a bad output as well; it comes later.
    """

    def __init__(self, model: nn.Module) -> None:
        self._calls: list[tuple[str, list[Tensor], list[Tensor]]] = []
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(
                self._hook(name or type(module).__name__), with_kwargs=True
            )
            for name, module in model.named_modules()
        ]

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # An attention mask holds -inf by intent, so inputs are judged by their maximum, which
            # NaN and +inf reach; outputs by magnitude.
            inputs = [t.detach().amax() for t in _floats((args, kwargs))]
            outputs = [largest_magnitude(t.detach()) for t in _floats(output)]
            self._calls.append((name, inputs, outputs))

        return keep

    def forget(self) -> None:
        """Begin a new step."""
        self._calls.clear()

    def culprit(self) -> str | None:
        """Name of the first module that made a non-finite value; None where none did."""
        for name, inputs, outputs in self._calls:
            if all(map(_is_harmless, inputs)) and not all(math.isfinite(o.item()) for o in outputs):
                return name
        return None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()


def _is_harmless(largest: Tensor) -> bool:
    value = largest.item()
    return math.isfinite(value) or value == -math.inf


def _floats(tree: Any) -> Iterator[Tensor]:
    """Floating-point tensors with elements in nested tuples, lists, dicts and model outputs."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point() and tree.numel():
            yield tree
    elif isinstance(tree, dict):
        for value in dict.values(tree):  # an output's field may be called `values`
            yield from _floats(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _floats(value)


__all__ = ["ActivationTrace"]
