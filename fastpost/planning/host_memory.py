"""Offloaded hidden states as on a GPU: what is packed lies in host memory, two at most on the way.

`fastpost.offloaded_states` itself runs; only its streams are ours (copies end when they begin), and
its pieces of host memory are named. On a CPU it copies from host memory to host memory, which is
traced as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fastpost import offloaded_states
from fastpost.offloaded_states import HostStates
from fastpost.planning.ledger import HOST
from fastpost.planning.tracer import Tracer

__all__ = ["host_states_named"]


class _Side:
    """A stream on which nothing waits."""

    def wait_stream(self, other: Any) -> None: ...

    def record_event(self) -> Any:
        return SimpleNamespace(wait=lambda: None)


_STREAMS = SimpleNamespace(
    Stream=lambda device: _Side(),
    current_stream=lambda device: None,
    stream=lambda side: nullcontext(),
)


@contextmanager
def host_states_named(tracer: Tracer) -> Iterator[None]:
    """Within, models that offload keep what they pack in `ledger.HOST`."""

    class Named(HostStates):
        def __init__(self) -> None:
            super().__init__(streams=_STREAMS)

        def pack(self, tensor: Any) -> Any:
            with tracer.during("", HOST):
                return super().pack(tensor)

    with mock.patch.object(offloaded_states, "HostStates", Named):
        yield
