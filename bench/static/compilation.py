"""Compiles the launches of host code for a GPU that need not be there.

Host code runs on meta tensors. Triton's launch is intercepted: its own specialisation and compiler
run (divisible strides, constants, number of warps: exactly what a GPU would get), the launch itself
does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

__all__ = ["Launch", "compile_launches", "compiler_cache"]


class Launch(NamedTuple):
    """One launch of host code: its arguments by name, its grid, Triton's compiled kernel."""

    arguments: dict[str, Any]
    grid: tuple[int, ...]
    compiled: Any


class AbsentDevice:
    """What Triton asks a driver before it compiles; the target names the cache as well."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiler_cache(folder: Path) -> Iterator[None]:
    """Triton reads and writes compiled kernels in `folder` only.

    Raises RuntimeError if this process interprets kernels: then there is nothing to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        yield


def compile_launches(
    run: Callable[[], object], function: JITFunction, target: GPUTarget
) -> list[Launch]:
    """Launches of `function` in `run`, in order; launches of other kernels do nothing.

    Raises what the compiler raises.
    """
    launches = []
    original = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self is not function:
            return None
        compiled = original(self, *args, grid=grid, warmup=True, **kwargs)
        named = {key: value for key, value in kwargs.items() if key in self.arg_names}
        bound = inspect.signature(self.fn).bind(*args, **named)
        bound.apply_defaults()
        launches.append(Launch(dict(bound.arguments), tuple(grid), compiled))
        return compiled

    previous = driver._active
    driver.set_active(AbsentDevice(target))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            run()
    finally:
        driver.set_active(previous)
    return launches
