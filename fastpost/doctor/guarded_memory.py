"""Memory that shows what a kernel must not do: bands around buffers, NaN where nothing was written.

Every buffer lies between two bands of bytes 0xFF, and a fresh one is filled with them. As a float
of any width these bytes are a NaN, so an unwritten result or a read outside its buffer reaches the
result; the NaN that arithmetic produces has other bytes, so a write outside shows too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ["GuardedMemory"]

BAND = 4096  # bytes on each side; a multiple of every alignment that vector loads ask for
_FILL = 0xFF
_full = torch.full  # as it is outside of GuardedMemory
_UNINITIALISED = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)
_INITIALISED = (
    (torch, "zeros"),
    (torch, "zeros_like"),
    (torch, "full"),
    (torch, "full_like"),
    (Tensor, "new_zeros"),
    (Tensor, "new_full"),
)


class GuardedMemory:
    """While entered, tensors that torch's factories return lie between bands, in every thread.

    The factories themselves are replaced: a `TorchFunctionMode` is off inside a registered op,
    which is where kernels make their buffers. Not for use beside other work in the same process.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []  # bytes, size of the inside
        self._patches = ExitStack()

    def __enter__(self) -> GuardedMemory:
        for places, keeps in ((_UNINITIALISED, False), (_INITIALISED, True)):
            for owner, name in places:
                made = self._guarded(getattr(owner, name), keeps)
                self._patches.enter_context(mock.patch.object(owner, name, made))
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.close()

    def _guarded(self, factory: Callable[..., Tensor], keeps: bool) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            made = factory(*args, **kwargs)
            between = self._between_bands(made)
            return between.copy_(made) if keeps and between is not made else between

        return make

    def guard(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, same strides, between bands."""
        return self._between_bands(tensor).copy_(tensor)

    def is_untouched(self) -> bool:
        """Whether every band still holds what it was filled with. Waits for the device."""
        return all(
            bool((band == _FILL).all())
            for buffer, size in self._buffers
            for band in (buffer[:BAND], buffer[BAND + size :])
        )

    def _between_bands(self, like: Tensor) -> Tensor:
        """An unwritten tensor of the shape, strides, dtype and device of `like`."""
        if like.numel() == 0 or like.device.type == "meta" or type(like) is not Tensor:
            return like
        steps = zip(like.shape, like.stride(), strict=True)
        elements = 1 + sum((length - 1) * stride for length, stride in steps)
        size = elements * like.element_size()
        buffer = _full((size + 2 * BAND,), _FILL, dtype=torch.uint8, device=like.device)
        self._buffers.append((buffer, size))
        inside = buffer[BAND : BAND + size].view(like.dtype)
        return inside.as_strided(like.shape, like.stride())
