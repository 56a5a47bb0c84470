"""What every test runs under: Triton's interpreter, fixed seeds, derandomised hypothesis.

Triton's interpreter multiplies bf16 operands of `tl.dot` as the raw integers that hold them (errors
of 1e10). The correction below widens them to fp32 first, which is what tensor cores do.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = (
    "1"  # read when kernels are decorated, so before any import of ours
)

from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=10,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("repeatable")

_create_dot = interpreter.InterpreterBuilder.create_dot


def _widen(handle: Any) -> Any:
    if handle.dtype != tl.bfloat16:
        return handle
    bits = handle.data.view(np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _create_dot_with_bf16(self: Any, a: Any, b: Any, *args: Any) -> Any:
    return _create_dot(self, _widen(a), _widen(b), *args)


interpreter.InterpreterBuilder.create_dot = _create_dot_with_bf16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose slow tests say their `minutes` first, so that both processes end together."""
    minutes: Counter[Any] = Counter()
    for item in items:
        if (slow := item.get_closest_marker("slow")) is not None:
            minutes[item.path] += slow.kwargs.get("minutes", 0)
    items.sort(key=lambda item: -minutes[item.path])


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_engine_outlives_its_test() -> Iterator[None]:
    """Attention functions of transformers are wrapped as long as any engine is installed."""
    yield
    backbone = sys.modules.get("fastpost.backbone")
    for engine in backbone.installed_engines() if backbone else []:
        engine.remove()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads as NaN: what is not written, or read too early, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
