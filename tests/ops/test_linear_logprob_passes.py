"""The tile passes one by one: every instruction set, guards around every buffer, far rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fastpost_kernels import _vocab_passes as passes_torch
from fastpost_kernels import _vocab_passes_cpp as passes_cpp
from fastpost_kernels import _vocab_passes_triton as passes_triton
from fastpost_kernels._csrc import library, open_library
from fastpost_kernels._device import resolve_backend
from fastpost_kernels._vocab_passes import COEF_ROWS, STATE_ROWS, LogitTransform
from fastpost_kernels.testing import Canary

BF16, FP32 = torch.bfloat16, torch.float32
TRANSFORMS = [LogitTransform(), LogitTransform(1.3, 5.0, 0.7)]
# 0 portable, 1 AVX2, 2 AVX-512; a CPU without one of them runs the best that it has
SIMD = {"portable": 0, "avx2": 1, "avx512": 2}
FOLDS: dict[str, Callable[..., None]] = {"triton": passes_triton.fold}
GRADIENTS: dict[str, Callable[..., None]] = {"triton": passes_triton.gradient}
for simd_name, level in SIMD.items():
    FOLDS[simd_name] = partial(passes_cpp.fold, simd_limit=level)
    GRADIENTS[simd_name] = partial(passes_cpp.gradient, simd_limit=level)


def storing_error(backend: str, dtype: torch.dtype) -> float:
    """Relative error of one store; Triton's interpreter truncates to bf16, hardware rounds."""
    if dtype == FP32:
        return 3e-6
    return 2**-7 if backend == "triton" else 2**-8


def logits(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return (4 * torch.randn(rows, cols)).to(dtype)


def state_of(rows: int) -> torch.Tensor:
    state = torch.zeros(STATE_ROWS, rows)
    state[5:8] = -torch.inf
    return state


@pytest.mark.parametrize("cols", [1, 15, 130, 2500])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "transformed"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", FOLDS)
def test_fold_equals_torch_and_stays_inside(
    backend: str, dtype: torch.dtype, transform: LogitTransform, cols: int
) -> None:
    """State and stored exponentials equal the torch pass in float64; margins survive."""
    tile = logits(6, cols, dtype)
    targets = torch.tensor([100, 100 + cols - 1, 99, 100 + cols, 0, 100 + cols // 2])
    bias = torch.randn(cols)
    kept = Canary(tile)
    state = Canary(state_of(6))
    flags = {"moments": True, "top1": True, "store_exp": True}
    FOLDS[backend](kept.inner, state.inner, targets, 100, bias, transform, **flags)
    exact_tile, exact_state = tile.double(), state_of(6).double()
    passes_torch.fold(exact_tile, exact_state, targets, 100, bias.double(), transform, **flags)
    # Sums of logits of both signs cancel: an absolute error of half a unit per term. C++ takes a
    # shorter exponential for 16-bit tiles, 3e-6 each and twice that squared.
    short = dtype == BF16 and backend != "triton"
    torch.testing.assert_close(
        state.inner.double(), exact_state, rtol=8e-6 if short else 3e-6, atol=1e-5 + 1e-7 * cols
    )
    rtol = storing_error(backend, dtype)
    torch.testing.assert_close(kept.inner.double(), exact_tile, rtol=rtol, atol=1e-30)
    kept.assert_untouched()
    state.assert_untouched()


@pytest.mark.parametrize("cols", [1, 15, 130, 2500])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "transformed"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", GRADIENTS)
def test_gradient_equals_torch_and_stays_inside(
    backend: str, dtype: torch.dtype, transform: LogitTransform, cols: int
) -> None:
    tile = logits(6, cols, dtype)
    targets = torch.tensor([100, 100 + cols - 1, 99, 100 + cols, 0, 100 + cols // 2])
    bias = torch.randn(cols)
    coefs = torch.randn(COEF_ROWS, 6)
    coefs[0] += 12
    kept, guarded = Canary(tile), Canary(coefs)
    GRADIENTS[backend](kept.inner, guarded.inner, targets, 100, bias, transform)
    exact = tile.double()
    passes_torch.gradient(exact, coefs.double(), targets, 100, bias.double(), transform)
    rtol, scale = storing_error(backend, dtype), float(exact.abs().max())
    torch.testing.assert_close(kept.inner.double(), exact, rtol=rtol, atol=1e-6 * scale)
    kept.assert_untouched()
    guarded.assert_untouched()
    assert torch.equal(guarded.inner, coefs)


def test_exponentials_to_two_ulp() -> None:
    """The C++ exponential over the whole range it meets, against float64."""
    z = torch.linspace(-86.9, 30, 100_001)[None]
    state, exact = state_of(1), z.double().exp()
    tile = z.clone()
    passes_cpp.fold(
        tile,
        state,
        torch.tensor([-1]),
        0,
        None,
        LogitTransform(),
        moments=False,
        top1=False,
        store_exp=True,
    )
    assert ((tile.double() - exact).abs() / exact).max() < 2 * 2**-23


@pytest.mark.parametrize("simd", SIMD.values(), ids=SIMD.keys())
def test_accumulate_rescales_rows_and_stays_inside(simd: int) -> None:
    a, b = torch.randn(5, 7).to(BF16), torch.randn(7, 33).to(BF16)
    guarded = Canary(torch.randn(5, 33), strides=(33, 1))
    acc = guarded.inner
    rescale = torch.rand(5)
    expected = acc * rescale[:, None] + (a @ b).float()
    passes_cpp.multiply_accumulate(
        acc, a, b, torch.empty(5, 33, dtype=BF16), rescale, simd_limit=simd
    )
    torch.testing.assert_close(acc, expected, rtol=1e-6, atol=1e-6)
    guarded.assert_untouched()


def test_rescale_kernel_skips_rows_of_factor_one() -> None:
    acc, a, b = torch.randn(4, 1500), torch.zeros(4, 3), torch.zeros(3, 1500)
    factor = torch.tensor([1.0, 0.5, 1.0, 2.0])
    expected = acc * factor[:, None]
    passes_triton.multiply_accumulate(acc, a, b, None, factor)
    assert torch.equal(acc, expected)


@pytest.mark.parametrize("backend", ["triton", "avx512"])
def test_rows_past_two_to_the_31(backend: str) -> None:
    """A row stride whose product with the row number passes 2^31 elements, over one real row.

    The tile is a view with rows 2^30 + 64 elements apart in a sparse file of 12 GB: only the
    touched pages exist.
    """
    import mmap
    import tempfile

    stride, rows, cols = (1 << 30) + 64, 4, 40
    size = 4 * (stride * (rows - 1) + cols)
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
        flat = torch.frombuffer(memory, dtype=FP32)
        tile = flat.as_strided((rows, cols), (stride, 1))
        tile.copy_(torch.randn(rows, cols))
        exact, targets = tile.double(), torch.tensor([0, 1, 2, 3])
        exact_state, state = state_of(rows).double(), state_of(rows)
        flags: dict[str, Any] = {"moments": True, "top1": True, "store_exp": True}
        FOLDS[backend](tile, state, targets, 0, None, LogitTransform(), **flags)
        passes_torch.fold(exact, exact_state, targets, 0, None, LogitTransform(), **flags)
        torch.testing.assert_close(state.double(), exact_state, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(tile.double(), exact, rtol=3e-6, atol=1e-30)
        del tile, flat


def test_without_the_library_the_torch_backend_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """A Hub copy ships no compiled code: one warning, and "auto" is torch."""
    assert open_library(tmp_path) is None
    assert library() is not None, "build it: pip install -e ."
    from fastpost_kernels import _csrc

    monkeypatch.setattr(_csrc, "library", lambda: None)
    cpu = torch.device("cpu")
    assert resolve_backend("auto", cpu, FP32) == "torch"
    with pytest.raises(ValueError, match="compiled"):
        resolve_backend("cpp", cpu, FP32)
