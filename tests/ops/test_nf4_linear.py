"""nf4_linear, alone and with adapters, against the float64 reference on the unpacked weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastpost_kernels import (
    Nf4Weight,
    dora_linear,
    dora_weight_norm,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
    reference,
    row_square_norms,
)
from fastpost_kernels._philox import random_words, threshold_of
from fastpost_kernels.nf4_linear import dequantize_op, nf4_linear_bwd, nf4_linear_fwd
from fastpost_kernels.testing import assert_close_to_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BACKENDS = [
    pytest.param("torch", FP32, id="torch-fp32"),
    pytest.param("cpp", FP32, id="cpp-fp32"),
    pytest.param("cpp", BF16, id="cpp-bf16"),
    pytest.param("triton", FP32, id="triton-fp32"),
    pytest.param("triton", BF16, id="triton-bf16"),
]
NAMES = ("x", "bias", "a", "b")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    """Several tiles each way, as for a large weight."""
    monkeypatch.setattr("fastpost_kernels._nf4_unpack.TILE_BYTES", {"cpu": 1 << 13})


def problem(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, rank: int = 4
) -> tuple[dict[str, Tensor], Nf4Weight, Tensor]:
    shapes = {"x": (rows, inputs), "bias": (outputs,), "a": (rank, inputs), "b": (outputs, rank)}
    tensors = {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}
    weight = nf4_quantize(torch.randn(outputs, inputs))
    return tensors, weight, torch.randn(rows, outputs).to(dtype)


def ours(tensors: dict[str, Tensor], weight: Nf4Weight, grad: Tensor, **options: Any):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = nf4_linear(leaves["x"], weight, **{k: leaves[k] for k in NAMES[1:]}, scale=0.5, **options)
    return [y.detach(), *torch.autograd.grad(y, [leaves[n] for n in NAMES], grad)]


def plain(tensors, weight: Nf4Weight, grad: Tensor, dtype, kept: Tensor | None = None):
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    # what is multiplied is the unpacked weight as the compute dtype holds it
    unpacked = nf4_dequantize(weight, grad.dtype).to(dtype)
    x, bias, a, b = (leaves[name] for name in NAMES)
    kept = None if kept is None else kept.to(dtype)
    y = reference.lora_linear(x, unpacked, bias, a, b, 0.5, kept)
    return [y.detach(), *torch.autograd.grad(y, [leaves[n] for n in NAMES], grad.to(dtype))]


def assert_matches(got, tensors, weight, grad, kept: Tensor | None = None) -> None:
    truth, rough = (plain(tensors, weight, grad, kind, kept) for kind in (FP64, grad.dtype))
    for name, *values in zip(("y", *NAMES), got, truth, rough, strict=True):
        assert_close_to_reference(*values, grad.dtype, name)


@pytest.mark.parametrize(
    "shape", [(5, 128, 40), (70, 128, 40), (3, 70, 9), (66, 70, 9), (0, 64, 8), (4, 31, 9)]
)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_matches_reference(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Few rows and many; whole blocks in a row and straddling ones; odd widths."""
    tensors, weight, grad = problem(*shape, dtype)
    got = ours(tensors, weight, grad, backend=backend)
    assert all(t.dtype == dtype for t in got)
    assert_matches(got, tensors, weight, grad)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_dropout(backend: str, dtype: torch.dtype) -> None:
    tensors, weight, grad = problem(21, 128, 30, dtype)
    kept = (random_words(77, 21, 128) >= threshold_of(0.35)).double() / 0.65
    got = ours(tensors, weight, grad, dropout_p=0.35, seed=77, backend=backend)
    assert_matches(got, tensors, weight, grad, kept)


def test_without_an_adapter() -> None:
    tensors, weight, grad = problem(12, 128, 40, FP32)
    x = tensors["x"].requires_grad_()
    y = nf4_linear(x, weight)
    unpacked = nf4_dequantize(weight, FP32)
    torch.testing.assert_close(y, x @ unpacked.T)
    (d_x,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(d_x, grad @ unpacked)


def test_dora_on_a_quantised_weight() -> None:
    """The layer and its norm are those of the unpacked weight; the kept square norms serve."""
    tensors, weight, grad = problem(12, 128, 40, FP32)
    unpacked, magnitude = nf4_dequantize(weight, FP32), torch.rand(40)
    a, b = tensors["a"], tensors["b"]
    norm = dora_weight_norm(weight, a, b, 0.5)
    torch.testing.assert_close(norm, reference.dora_weight_norm(unpacked, a, b, 0.5))
    torch.testing.assert_close(dora_weight_norm(weight, a, b, 0.5, row_square_norms(weight)), norm)
    results = []
    for kind in (weight, unpacked):
        leaves = [t.detach().requires_grad_() for t in (*tensors.values(), magnitude)]
        x, bias, a, b, m = leaves
        y = dora_linear(x, kind, bias, a, b, 0.5, m, norm)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_flops_and_what_is_kept() -> None:
    """Base, adapter; x is kept for d A alone and the weight never in 16 bits."""
    (x, bias, a, b), weight, grad = (
        problem(16, 128, 64, BF16)[0].values(),
        *problem(16, 128, 64, BF16)[1:],
    )
    base, rank = 2 * 16 * 128 * 64, 2 * 16 * 4 * (128 + 64)
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with FlopCounterMode(display=False) as counter, hooks:
        y = nf4_linear(leaves[0], weight, bias, a=leaves[1], b=leaves[2])
    assert counter.get_total_flops() == base + rank
    assert max(t.numel() * t.itemsize for t in kept) == weight.packed.numel()
    with FlopCounterMode(display=False) as counter:
        y.backward(grad)
    assert counter.get_total_flops() == base + 2 * rank
    kept.clear()
    with hooks:
        nf4_linear(leaves[0], weight, bias)
    assert all(t.data_ptr() != x.data_ptr() and t.numel() != 16 * 128 for t in kept)


def test_autocast_and_wide_adapters() -> None:
    tensors, weight, grad = problem(10, 128, 24, FP32)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    with torch.autocast("cpu", BF16):
        y = nf4_linear(leaves["x"], weight, **{k: leaves[k] for k in NAMES[1:]}, scale=0.5)
    assert y.dtype == BF16
    got = torch.autograd.grad(y, [leaves[n] for n in NAMES], grad.to(BF16))
    assert all(g.dtype == FP32 for g in got)
    truth = plain(tensors, weight, grad.to(BF16), FP64)
    for name, found, right in zip(NAMES, got, truth[1:], strict=True):
        torch.testing.assert_close(
            found.double(), right, rtol=0.03, atol=0.03 * float(right.abs().max()), msg=name
        )


def test_opcheck() -> None:
    tensors, weight, grad = problem(6, 64, 8, FP32, rank=2)
    x, bias, a, b = (t.requires_grad_() for t in tensors.values())
    parts = (*weight[:2], *weight[4:], list(weight.shape), weight.block_size)
    torch.library.opcheck(nf4_linear_fwd, (x, *parts, bias, a, b, 0.5, 0.2, 5, "auto"))
    u = torch.randn(6, 2)
    detached = [t.detach() for t in (a, b)]
    torch.library.opcheck(
        nf4_linear_bwd, (grad, x.detach(), u, *parts, *detached, 0.5, 0.0, 0, "auto", True)
    )
    torch.library.opcheck(dequantize_op, (*parts, BF16, "auto"))


def test_refuses() -> None:
    tensors, weight, _ = problem(3, 64, 6, FP32)
    with pytest.raises(ValueError, match=r"weight is \[N=6, K=64\]: got x \(3, 32\)"):
        nf4_linear(tensors["x"][:, :32], weight)
    with pytest.raises(ValueError, match="both a and b"):
        nf4_linear(tensors["x"], weight, a=tensors["a"])
    with pytest.raises(ValueError, match="seed is None"):
        nf4_linear(tensors["x"], weight, a=tensors["a"], b=tensors["b"], dropout_p=0.1)
    with pytest.raises(ValueError, match="backend must be one of"):
        nf4_linear(tensors["x"], weight, backend="cuda")
