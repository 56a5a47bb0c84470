"""rms_norm against the float64 reference and transformers' module; the torch ops around it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastpost_kernels import _layer_passes as passes
from fastpost_kernels import reference, rms_norm, workspace_bytes
from fastpost_kernels.rms_norm import rms_norm_bwd, rms_norm_fwd
from fastpost_kernels.testing import Canary, assert_close_to_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BACKENDS = [
    pytest.param("torch", FP64, id="torch-fp64"),
    pytest.param("torch", FP32, id="torch-fp32"),
    pytest.param("torch", BF16, id="torch-bf16"),
    pytest.param("cpp", FP32, id="cpp-fp32"),
    pytest.param("cpp", BF16, id="cpp-bf16"),
]
# 0 portable, 1 AVX2, 2 AVX-512; a CPU without one of them runs the best that it has
SIMD = {"portable": 0, "avx2": 1, "avx512": 2}
EPS = 1e-5

Results = tuple[Tensor, Tensor, Tensor]


def problem(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> Results:
    """x, weight and the gradient of y."""
    return (
        (scale * torch.randn(rows, width)).to(dtype),
        torch.randn(width).to(dtype),
        torch.randn(rows, width).to(dtype),
    )


def results(
    f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor
) -> Results:
    """y, d x and d weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = f(x, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))


def reference_results(data: Results, dtype: torch.dtype, eps: float = EPS) -> Results:
    return results(lambda x, w: reference.rms_norm(x, w, eps), *(t.to(dtype) for t in data))


def assert_matches(got: Results, data: Results, dtype: torch.dtype, eps: float = EPS) -> None:
    truth, rough = reference_results(data, FP64, eps), reference_results(data, dtype, eps)
    for name, *values in zip(("y", "d x", "d weight"), got, truth, rough, strict=True):
        assert_close_to_reference(*values, dtype, name)


def check(data: Results, dtype: torch.dtype, backend: str, eps: float = EPS) -> None:
    got = results(lambda x, w: rms_norm(x, w, eps, backend=backend), *data)
    assert all(t.dtype == dtype for t in got)
    assert_matches(got, data, dtype, eps)


@pytest.mark.parametrize("width", [7, 576, 577])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_matches_reference(backend: str, dtype: torch.dtype, width: int) -> None:
    check(problem(21, width, dtype), dtype, backend)


@given(
    rows=st.sampled_from([0, 1, 2, 15, 16, 17, 33]),
    width=st.sampled_from([1, 7, 16, 31, 65, 255, 257, 600]),
    dtype=st.sampled_from([FP32, BF16]),
)
def test_ragged_shapes(rows: int, width: int, dtype: torch.dtype) -> None:
    check(problem(rows, width, dtype), dtype, "cpp")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_more_rows_than_blocks(dtype: torch.dtype) -> None:
    """4001 rows: blocks of 32 with a partial last one."""
    check(problem(4001, 9, dtype), dtype, "cpp")


@pytest.mark.parametrize("level", SIMD.values(), ids=SIMD)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_every_instruction_set(dtype: torch.dtype, level: int) -> None:
    data = x, weight, grad = problem(19, 133, dtype)
    y, rstd = passes.rms_norm_forward(x, weight, EPS, simd_limit=level)
    d_x, d_weight = passes.rms_norm_backward(grad, x, weight, rstd, True, True, simd_limit=level)
    assert d_x is not None and d_weight is not None
    assert_matches((y, d_x, d_weight), data, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_equals_transformers(dtype: torch.dtype) -> None:
    """bf16 within one unit of the last place (rounded where the module rounds), fp32 to 1e-6."""
    x, weight, _ = problem(50, 577, dtype)
    module = LlamaRMSNorm(577, EPS).to(dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        stock, ours = module(x), rms_norm(x, weight, EPS, backend="cpp")
    tolerance = {FP32: 1e-6, BF16: 2**-7}[dtype]
    torch.testing.assert_close(ours, stock, rtol=tolerance, atol=0)
    if dtype == BF16:
        assert (ours != stock).double().mean() < 1e-3


@pytest.mark.parametrize("scale", [1e-6, 1e4, 1e15])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_small_and_large_values(dtype: torch.dtype, scale: float) -> None:
    check(problem(5, 96, dtype, scale), dtype, "cpp")


def test_squares_that_overflow_give_zero_as_in_transformers() -> None:
    x = torch.full((2, 40), 1e30)
    with torch.no_grad():
        stock = LlamaRMSNorm(40, EPS)(x)
    ours = rms_norm(x, torch.ones(40), EPS, backend="cpp")
    assert torch.equal(ours, stock) and not ours.any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_zero_rows(dtype: torch.dtype) -> None:
    """x = 0: y is 0 and d x is grad * weight / sqrt(eps)."""
    data = problem(6, 33, dtype)
    data[0][::2] = 0
    check(data, dtype, "cpp")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    x, weight, grad = problem(4, 70, dtype)
    x[1, 3] = float("nan")
    y, d_x, d_weight = results(lambda x, w: rms_norm(x, w, EPS, backend="cpp"), x, weight, grad)
    for values in (y, d_x):
        assert values.isnan().all(1).tolist() == [False, True, False, False]
        assert values.isnan().any(1).tolist() == [False, True, False, False]
    assert d_weight.isnan().all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_views_are_read_in_place_and_nothing_else_is_touched(dtype: torch.dtype) -> None:
    """Rows apart, columns apart, an expanded gradient, leading dimensions; inputs as they were."""
    data = x, weight, grad = problem(12, 34, dtype)
    rows_apart, grad_apart = Canary(x), Canary(grad)
    got = results(lambda x, w: rms_norm(x, w, EPS), rows_apart.inner, weight, grad_apart.inner)
    assert_matches(got, data, dtype)
    columns_apart = x.T.contiguous().T
    assert_matches(
        results(lambda x, w: rms_norm(x, w, EPS), columns_apart, weight, grad), data, dtype
    )
    ones = x.new_ones(()).expand(12, 34)
    got = results(lambda x, w: rms_norm(x, w, EPS), x, weight, ones)
    assert_matches(got, (x, weight, ones), dtype)
    four = rms_norm(x.view(2, 3, 2, 34), weight, EPS)
    assert four.shape == (2, 3, 2, 34) and torch.equal(four.view(12, 34), rms_norm(x, weight, EPS))
    assert torch.equal(rms_norm(x[0], weight, EPS), rms_norm(x, weight, EPS)[0])
    for canary, original in ((rows_apart, x), (grad_apart, grad)):
        canary.assert_untouched()
        assert torch.equal(canary.inner, original)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    data = problem(400, 130, FP32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(lambda x, w: rms_norm(x, w, EPS, backend="cpp"), *data))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["x", "weight"])
def test_only_what_is_needed_is_computed(needs: tuple[bool, bool]) -> None:
    x, weight, grad = problem(20, 24, FP32)
    both = results(lambda x, w: rms_norm(x, w, EPS, backend="cpp"), x, weight, grad)[1:]
    x, weight = x.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    rms_norm(x, weight, EPS, backend="cpp").backward(grad)
    for leaf, need, expected in zip((x, weight), needs, both, strict=True):
        assert (leaf.grad is None) == (not need)
        assert leaf.grad is None or torch.equal(leaf.grad, expected)
    _, rstd = rms_norm_fwd(x.detach(), weight.detach(), EPS)
    found = rms_norm_bwd(grad, x.detach(), weight.detach(), rstd, *needs)
    assert [t.numel() > 0 for t in found] == list(needs)


def test_sabotage_is_caught() -> None:
    """Four tolerances beside the truth, in each result."""
    data = problem(8, 64, FP32)
    good = results(lambda x, w: rms_norm(x, w, EPS, backend="cpp"), *data)
    for i in range(3):
        bad = [t.clone() for t in good]
        bad[i].view(-1)[0] += 1e-5 * bad[i].abs().max()
        with pytest.raises(AssertionError, match="error"):
            assert_matches((bad[0], bad[1], bad[2]), data, FP32)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_opcheck_and_compile(dtype: torch.dtype) -> None:
    x, weight, grad = problem(6, 40, dtype)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.library.opcheck(rms_norm_fwd, (*leaves, EPS))
    _, rstd = rms_norm_fwd(x, weight, EPS)
    torch.library.opcheck(rms_norm_bwd, (grad, x, weight, rstd, True, False))
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    eager = results(lambda x, w: rms_norm(x, w, EPS), x, weight, grad)
    traced = results(lambda x, w: compiled(x, w, EPS), x, weight, grad)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_workspace_is_a_formula_without_rows() -> None:
    """Contiguous rows: threads and blocks times the width, also for fake tensors."""
    with FakeTensorMode():
        few, many = (torch.empty(rows, 64) for rows in (200, 1_000_000))
        weight = torch.empty(64)
        assert workspace_bytes(rms_norm_fwd._opoverload, few, weight, EPS) == workspace_bytes(
            rms_norm_fwd._opoverload, many, weight, EPS
        )
        sizes = [
            workspace_bytes(rms_norm_bwd._opoverload, x, x, weight, torch.empty(0), True, True)
            for x in (few, many)
        ]
    assert sizes[0] == sizes[1] >= 4 * 64 * 128


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(5)}, ValueError, r"\(5,\)"),
        ({"x": torch.ones(3, 0), "weight": torch.ones(0)}, ValueError, "H > 0"),
        ({"weight": torch.ones(4, dtype=BF16)}, TypeError, "one floating dtype"),
        ({"x": torch.ones(3, 4).long(), "weight": torch.ones(4).long()}, TypeError, "int64"),
        ({"weight": torch.ones(4, device="meta")}, ValueError, "meta"),
        ({"eps": -1e-6}, ValueError, "eps"),
        ({"eps": float("nan")}, ValueError, "eps"),
        ({"backend": "triton"}, ValueError, "backend"),
        ({"x": torch.ones(3, 4).double(), "weight": torch.ones(4).double(), "backend": "cpp"},
         ValueError, "float64"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"x": torch.ones(3, 4), "weight": torch.ones(4), "eps": EPS} | change
    with pytest.raises(error, match=message):
        rms_norm(**arguments)
