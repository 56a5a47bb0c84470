"""Checkpointed hidden states wait in host memory for the backward, on the way while layers compute.

A checkpointed layer keeps its input, [tokens, hidden], until the backward computes it again: with
everything else recomputed these are what grows with layers x tokens. Here autograd's hooks for
saved tensors copy each to host memory as the layer begins and back before it is needed:

    forward     layer i computes | the input of layer i goes out, on a stream of its own
    backward    layer i computes | the input of layer i - 1 comes in, on that stream

Two inputs are under way at most (double buffering): a third waits for the first to have left, so
that device memory holds two whatever the depth. The last two of a forward are still there when the
backward begins, and do not travel back. Nothing is reused before the stream that still reads it is
waited for, so that results are those without offloading, bit for bit.

Host memory is pinned, in pieces of 64 MiB: PyTorch's allocator of pinned memory rounds every piece
up to a power of two and keeps it, so that one piece an input would waste up to half of it, and
inputs of other lengths would not fit into what is kept. Pageable memory would make every copy wait.

transformers' own `offload` copies on the stream that computes, one piece an input, and needs a GPU.
On a CPU these copies go from host memory to host memory: nothing is saved, and the rest is tested.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["PIECE_BYTES", "HostStates", "offloading"]

PIECE_BYTES = 1 << 26
_UNDER_WAY = 2


class _Kept:
    """A tensor in host memory, and what is needed to have it back."""

    def __init__(self, tensor: Tensor, before: weakref.ref[_Kept] | None) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.pieces: list[Tensor] = []
        self.on_device: Tensor | None = None  # flat, while it leaves or once it is back
        self.event: Any = None  # of the end of its last copy
        # What the backward needs next. Weak: the graph alone decides how long a tensor is kept.
        self._before = before

    @property
    def before(self) -> _Kept | None:
        return None if self._before is None else self._before()

    def __del__(self) -> None:
        # A graph that is dropped: its memory must not be reused while a copy runs.
        if self.on_device is not None and self.event is not None:
            self.event.wait()


class HostStates:
    """`pack` and `unpack` for autograd's saved tensors; one object for all layers of a model.

    Args:
        streams: `torch.cuda` or the module of another device, with `Stream`, `stream` and
            `current_stream`; None copies at once (CPU). By default that of the first tensor.
        piece_bytes: of a piece of host memory.
    """

    def __init__(self, streams: Any = ..., piece_bytes: int = PIECE_BYTES) -> None:
        self._streams = streams
        self._piece_bytes = piece_bytes
        self._side: Any = None
        self._leaving: deque[_Kept] = deque()
        self._last: weakref.ref[_Kept] | None = None

    def pack(self, tensor: Tensor) -> Tensor | _Kept:
        """Sends an activation away. Parameters, integers and tensor subclasses stay as they are."""
        if type(tensor) is not Tensor or not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor
        with torch.no_grad():
            self._choose(tensor.device)
            kept = _Kept(tensor, self._last)
            self._last = weakref.ref(kept)
            flat = tensor.detach().reshape(-1)
            parts = self._parts(flat)
            is_pinned = tensor.device.type != "cpu"
            kept.pieces = [
                torch.empty(part.numel(), dtype=part.dtype, pin_memory=is_pinned) for part in parts
            ]
            if self._side is None:
                _copy(kept.pieces, parts)
            else:
                self._make_room()
                self._copy_aside(kept, kept.pieces, parts)
                kept.on_device = flat
                self._leaving.append(kept)
            return kept

    def unpack(self, kept: Tensor | _Kept) -> Tensor:
        """What was packed. The tensor packed before it starts to come back."""
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            self._fetch(kept)
            if self._side is not None:
                kept.event.wait()
                if kept.before is not None:
                    self._fetch(kept.before)
            found, kept.on_device = kept.on_device, None
            assert found is not None
            return found.view(kept.shape)

    def _choose(self, device: torch.device) -> None:
        if self._streams is ...:
            self._streams = None if device.type == "cpu" else torch.get_device_module(device)
        if self._streams is not None and self._side is None:
            self._side = self._streams.Stream(device)

    def _parts(self, flat: Tensor) -> Sequence[Tensor]:
        return flat.split(max(1, self._piece_bytes // flat.element_size()))

    def _make_room(self) -> None:
        """Waits for the oldest copies and frees what has left, so that one more may go."""
        while len(self._leaving) >= _UNDER_WAY:
            gone = self._leaving.popleft()
            gone.event.wait()
            gone.on_device = None

    def _fetch(self, kept: _Kept) -> None:
        """Starts the way back of what is not on the device."""
        if kept in self._leaving:
            self._leaving.remove(kept)
        if kept.on_device is not None:
            return
        # of the stream that computes: it alone will use and free it
        numel = kept.shape.numel()
        kept.on_device = torch.empty(numel, dtype=kept.dtype, device=kept.device)
        parts = self._parts(kept.on_device)
        if self._side is None:
            _copy(parts, kept.pieces)
        else:
            self._copy_aside(kept, parts, kept.pieces)

    def _copy_aside(self, kept: _Kept, to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
        # What is read may just be computed; what is written may still be read by its last user.
        self._side.wait_stream(self._streams.current_stream(kept.device))
        with self._streams.stream(self._side):
            _copy(to, source)
        kept.event = self._side.record_event()


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for one, other in zip(to, source, strict=True):
        one.copy_(other, non_blocking=True)


def offloading(checkpoint: Callable[..., Any], states: HostStates | None = None) -> Any:
    """`checkpoint(function, *args)` with the tensors of `args` kept in host memory.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` with its options bound.
        states: where they are kept; by default a new one.
    """
    states = HostStates() if states is None else states

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(states.pack, states.unpack):
            return checkpoint(function, *args, **kwargs)

    return run
