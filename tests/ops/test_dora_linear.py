"""dora_linear and its norm against the float64 reference; cancellation; the ops around them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastpost_kernels import _adapter_passes as passes
from fastpost_kernels import dora_linear, dora_weight_norm, reference
from fastpost_kernels._philox import random_words, threshold_of
from fastpost_kernels.dora_linear import column_scale_bwd, column_scale_fwd, scale_own_columns
from fastpost_kernels.testing import assert_close_to_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BACKENDS = [
    pytest.param("torch", FP64, id="torch-fp64"),
    pytest.param("torch", FP32, id="torch-fp32"),
    pytest.param("cpp", FP32, id="cpp-fp32"),
    pytest.param("cpp", BF16, id="cpp-bf16"),
    pytest.param("triton", FP32, id="triton-fp32"),
    pytest.param("triton", BF16, id="triton-bf16"),
]
NAMES = ("x", "bias", "a", "b", "magnitude")


def problem(
    rows: int, inputs: int, outputs: int, rank: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    shapes = {
        "x": (rows, inputs),
        "weight": (outputs, inputs),
        "bias": (outputs,),
        "a": (rank, inputs),
        "b": (outputs, rank),
        "magnitude": (outputs,),
    }
    tensors = {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}
    return tensors, torch.randn(rows, outputs).to(dtype)


def results(f: Callable[..., Tensor], tensors: dict[str, Tensor], grad: Tensor, **options: Any):
    """y and the gradients of NAMES."""
    leaves = {name: t.detach().requires_grad_(name != "weight") for name, t in tensors.items()}
    norm = dora_weight_norm(*(tensors[k].double() for k in ("weight", "a", "b")), 0.5)
    y = f(**leaves, scale=0.5, weight_norm=norm.to(grad.dtype), **options)
    return [y.detach(), *torch.autograd.grad(y, [leaves[name] for name in NAMES], grad)]


def assert_matches(got, tensors, grad, dtype, kept: Tensor | None = None) -> None:
    truth, rough = (
        results(
            reference.dora_linear,
            {name: t.to(kind) for name, t in tensors.items()},
            grad.to(kind),
            kept=None if kept is None else kept.to(kind),
        )
        for kind in (FP64, dtype)
    )
    for name, *values in zip(("y", *NAMES), got, truth, rough, strict=True):
        assert_close_to_reference(*values, dtype, name)


@pytest.mark.parametrize("shape", [(5, 24, 40, 4), (600, 9, 33, 2)])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_matches_reference(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors, grad = problem(*shape, dtype)
    got = results(dora_linear, tensors, grad, backend=backend)
    assert all(t.dtype == dtype for t in got)
    assert_matches(got, tensors, grad, dtype)


def test_dropout_is_the_adapters_alone() -> None:
    tensors, grad = problem(21, 75, 30, 4, FP32)
    kept = (random_words(11, 21, 75) >= threshold_of(0.35)).double() / 0.65
    got = results(dora_linear, tensors, grad, dropout_p=0.35, seed=11)
    assert_matches(got, tensors, grad, FP32, kept)


@given(
    rows=st.sampled_from([0, 1, 15, 16, 17, 1025]),
    width=st.sampled_from([1, 31, 255, 257]),
    dtype=st.sampled_from([FP32, BF16]),
    backend=st.sampled_from(["cpp", "triton"]),
)
def test_column_scale_on_ragged_shapes(
    rows: int, width: int, dtype: torch.dtype, backend: str
) -> None:
    z, grad = torch.randn(2, rows, width).to(dtype)
    scale, bias = torch.randn(2, width)
    y = passes.column_scale_forward(z, scale, bias, backend)
    d_z, d_scale = passes.column_scale_backward(grad, z, scale, True, backend)
    right = {
        "y": (y, z.double() * scale + bias),
        "d z": (d_z, grad.double() * scale),
        "d scale": (d_scale, (grad.double() * z).sum(0)),
    }
    for name, (got, truth) in right.items():
        kind = FP32 if name == "d scale" else dtype
        assert_close_to_reference(got, truth, truth.to(kind), kind, name)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_result_in_the_memory_of_its_own_input(backend: str, dtype: torch.dtype) -> None:
    """y replaces z, also for the backward, and magnitudes of zero keep their gradient."""
    z, grad = torch.randn(2, 70, 9).to(dtype)
    magnitude = torch.randn(9).abs()
    magnitude[:5] = torch.tensor([0.0, -0.0, 1e-35, -1e-35, -2.0])
    magnitude, norm = magnitude.to(dtype), torch.rand(9) + 1
    wide = z.double().requires_grad_(), magnitude.double().requires_grad_()
    truth = wide[1] / norm.double() * wide[0]
    truths = [truth.detach(), *torch.autograd.grad(truth, wide, grad.double())]
    leaves = z.requires_grad_(), magnitude.requires_grad_()
    made = [leaves[0] * factor for factor in (1, 3)]  # memory of its own, as a product has
    y, other = scale_own_columns(made, [leaves[1]] * 2, [norm] * 2, backend=backend)
    assert [y.data_ptr(), other.data_ptr()] == [z.data_ptr() for z in made]
    torch.testing.assert_close(other, 3 * y, rtol=0.02, atol=0.02)
    found = [y.detach(), *torch.autograd.grad(y, leaves, grad)]  # nothing of the other
    for name, got, right in zip(("y", "d z", "d magnitude"), found, truths, strict=True):
        assert got.dtype == dtype
        assert_close_to_reference(got, right, right.to(dtype), dtype, name)
    assert found[2][:5].abs().min() > 1e-3


@pytest.mark.parametrize("case", ["half", "strided", "watched"])
def test_what_cannot_take_the_memory_of_its_input_leaves_it_alone(case: str) -> None:
    z = torch.randn(6, 8, dtype=torch.float16 if case == "half" else torch.float32)
    z = z[:, :4] if case == "strided" else z
    before, width = z.clone(), z.shape[1]
    magnitude, norm = torch.randn(width).requires_grad_(), torch.rand(width) + 1
    with FlopCounterMode(display=False) if case == "watched" else nullcontext():
        (y,) = scale_own_columns([z], [magnitude], [norm])
    assert torch.equal(z, before)
    torch.testing.assert_close(y, (before * (magnitude / norm)).to(z.dtype), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("level", [0, 1, 2], ids=["portable", "avx2", "avx512"])
def test_column_scale_on_every_instruction_set(level: int) -> None:
    z, grad = torch.randn(2, 40, 93).to(BF16)
    scale = torch.randn(93)
    y = passes.column_scale_forward(z, scale, None, "cpp", level)
    d_z, d_scale = passes.column_scale_backward(grad, z, scale, True, "cpp", level)
    torch.testing.assert_close(y, (z * scale).to(BF16))
    torch.testing.assert_close(d_z, (grad * scale).to(BF16))
    torch.testing.assert_close(d_scale, (grad.float() * z).sum(0))


def test_sums_do_not_depend_on_threads() -> None:
    z, grad = torch.randn(2, 3000, 70)
    scale, threads = torch.randn(70), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(passes.column_scale_backward(grad, z, scale, False, "cpp")[1])
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_norm(dtype: torch.dtype, size: float) -> None:
    """Of adapters far smaller and far larger than the weight."""
    weight, a, b = torch.randn(50, 96), torch.randn(8, 96), size * torch.randn(50, 8)
    weight, a, b = weight.to(dtype), a.to(dtype), b.to(dtype)
    truth = reference.dora_weight_norm(weight.double(), a.double(), b.double(), 2.0)
    got = dora_weight_norm(weight, a, b, 2.0)
    assert got.dtype == (FP64 if dtype == FP64 else FP32)
    rtol = {FP64: 1e-12, FP32: 1e-6, BF16: 2**-9}[dtype]
    torch.testing.assert_close(got.double(), truth, rtol=rtol, atol=0)
    kept = torch.linalg.vector_norm(weight, dim=1, dtype=got.dtype).square()
    torch.testing.assert_close(dora_weight_norm(weight, a, b, 2.0, kept), got)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rank", [1, 16, 20, 64, 70])
def test_norms_of_any_rank_on_every_backend(rank: int, dtype: torch.dtype) -> None:
    """Under autocast too, which must not round them; rows that cancel are marked."""
    weight, a, b = torch.randn(37, 96).to(dtype), torch.randn(rank, 96), torch.randn(37, rank) / 4
    truth = reference.dora_weight_norm(weight.double(), a.double(), b.double(), 0.5)
    rtol = {FP32: 1e-6, BF16: 2**-9}[dtype]
    with torch.autocast("cpu", BF16):
        torch.testing.assert_close(
            dora_weight_norm(weight, a, b, 0.5).double(), truth, rtol=rtol, atol=0
        )
    cross, gram = weight @ a.to(dtype).t(), a @ a.t()
    squares = weight.float().square().sum(1)
    squares[5] = 2.0**-10  # of a row whose product with A is another's
    cross[5] = -(b[5] @ gram).to(dtype) / 4
    expected = passes.dora_norms(cross, b, gram, squares, 0.5, "torch")
    assert (expected < 0).nonzero().tolist() == [[5]]
    for level in (0, 1, 2):
        got = passes.dora_norms(cross, b, gram, squares, 0.5, "cpp", level)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("left", [0.3, 0.1, 1e-2, 1e-3])
def test_norm_where_the_adapter_takes_the_weight_away(dtype: torch.dtype, left: float) -> None:
    """W = -s B A + a little: the factored sum alone would keep none of the digits."""
    a, b = torch.randn(4, 64).to(dtype).double(), torch.randn(20, 4).to(dtype).double()
    weight = (-0.5 * b @ a + left * torch.randn(20, 64).double()).to(dtype)
    truth = reference.dora_weight_norm(weight.double(), a, b, 0.5)
    got = dora_weight_norm(weight, a.to(dtype), b.to(dtype), 0.5)
    rtol = {FP64: 1e-10, FP32: 1e-3 if left < 0.01 else 1e-4, BF16: 0.02}[dtype]
    torch.testing.assert_close(got.double(), truth, rtol=rtol, atol=0)


def test_one_row_that_vanishes_is_zero() -> None:
    a, b = torch.eye(4), torch.eye(4)
    weight = torch.eye(4)
    weight[2, 2] = -1.0
    assert dora_weight_norm(weight, a, b, 1.0).tolist() == [2.0, 2.0, 0.0, 2.0]


def test_opcheck() -> None:
    z, grad = torch.randn(2, 5, 7)
    magnitude, bias = torch.randn(2, 7)
    norm = torch.rand(7) + 1
    z, magnitude, bias = (t.clone().requires_grad_() for t in (z, magnitude, bias))
    torch.library.opcheck(column_scale_fwd, (z, magnitude, norm, bias, "auto"))
    fixed = (z.detach(), magnitude.detach(), norm)
    torch.library.opcheck(column_scale_bwd, (grad, *fixed, True, True, "auto"))


def test_refuses() -> None:
    tensors, _ = problem(3, 8, 6, 2, FP32)
    with pytest.raises(ValueError, match=r"expected magnitude \[6\], got \(5,\)"):
        changed = tensors | {"magnitude": torch.ones(5)}
        dora_linear(**changed, scale=1.0, weight_norm=torch.ones(6))
    with pytest.raises(ValueError, match=r"expected a \[r, 8\] and b \[6, 2\]"):
        dora_weight_norm(tensors["weight"], tensors["a"], torch.ones(6, 3), 1.0)
