"""swiglu against the float64 reference and torch's own; the torch ops around it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpost_kernels import _layer_passes as passes
from fastpost_kernels import reference, swiglu, workspace_bytes
from fastpost_kernels.swiglu import swiglu_bwd, swiglu_fwd
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

Results = tuple[Tensor, Tensor, Tensor]


def problem(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> Results:
    """gate, up and the gradient of y."""
    gate, up, grad = torch.randn(3, rows, width)
    return (scale * gate).to(dtype), up.to(dtype), grad.to(dtype)


def results(
    f: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor, grad: Tensor
) -> Results:
    """y, d gate and d up."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = f(gate, up)
    return (y.detach(), *torch.autograd.grad(y, (gate, up), grad))


def assert_matches(got: Results, data: Results, dtype: torch.dtype) -> None:
    truth, rough = (
        results(reference.swiglu, *(t.to(kind) for t in data)) for kind in (FP64, dtype)
    )
    for name, *values in zip(("y", "d gate", "d up"), got, truth, rough, strict=True):
        assert_close_to_reference(*values, dtype, name)


def cpp(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu(gate, up, backend="cpp")


@pytest.mark.parametrize("width", [7, 1024, 1537])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_matches_reference(backend: str, dtype: torch.dtype, width: int) -> None:
    """Below one block, exactly one, one and a ragged second."""
    data = problem(11, width, dtype, scale=3.0)
    got = results(lambda gate, up: swiglu(gate, up, backend=backend), *data)
    assert all(t.dtype == dtype for t in got)
    assert_matches(got, data, dtype)


@given(
    rows=st.sampled_from([0, 1, 2, 17]),
    width=st.sampled_from([1, 7, 31, 64, 577, 1025, 2048, 2049]),
    dtype=st.sampled_from([FP32, BF16]),
)
def test_ragged_shapes(rows: int, width: int, dtype: torch.dtype) -> None:
    data = problem(rows, width, dtype)
    assert_matches(results(cpp, *data), data, dtype)


@pytest.mark.parametrize("level", SIMD.values(), ids=SIMD)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_every_instruction_set(dtype: torch.dtype, level: int) -> None:
    data = gate, up, grad = problem(5, 1061, dtype, scale=4.0)
    y = passes.swiglu_forward(gate, up, simd_limit=level)
    d_gate, d_up = passes.swiglu_backward(grad, gate, up, True, True, simd_limit=level)
    assert d_gate is not None and d_up is not None
    assert_matches((y, d_gate, d_up), data, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_equals_torch(dtype: torch.dtype) -> None:
    """bf16 within one unit of the last place (rounded where torch rounds), fp32 to 2e-6."""
    gate, up, _ = problem(20, 577, dtype, scale=4.0)
    stock, ours = torch.nn.functional.silu(gate) * up, cpp(gate, up)
    torch.testing.assert_close(ours, stock, rtol={FP32: 2e-6, BF16: 2**-7}[dtype], atol=0)
    if dtype == BF16:
        assert (ours != stock).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_saturated_gates(dtype: torch.dtype) -> None:
    """Where e^-x overflows or vanishes: the identity above, zero below, and so the gradients."""
    gate = torch.tensor([[-1e38, -1e4, -200, -89, -88, -87, -30, 0, 30, 88, 200, 1e4, 1e38]])
    up, grad = torch.full_like(gate, 0.5), torch.ones_like(gate)
    y, d_gate, d_up = results(cpp, gate.to(dtype), up.to(dtype), grad.to(dtype))
    silu = gate.clamp(min=0).to(dtype).float()
    torch.testing.assert_close(y.float(), silu / 2, rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(d_up.float(), silu, rtol=1e-5, atol=1e-10)
    expected = (torch.sign(gate) + 1) / 4
    torch.testing.assert_close(d_gate.float(), expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_nan_stays_where_it_is(dtype: torch.dtype) -> None:
    for position in range(2):
        data = problem(3, 40, dtype)
        data[position][1, 5] = float("nan")
        y, d_gate, d_up = results(cpp, *data)
        expected = data[position].isnan()
        # d up does not see up
        for got in (y, d_gate, *((d_up,) if position == 0 else ())):
            assert torch.equal(got.isnan(), expected)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_views_are_read_in_place_and_nothing_else_is_touched(dtype: torch.dtype) -> None:
    """Halves of one matrix, columns apart, an expanded gradient, leading dimensions."""
    data = gate, up, grad = problem(12, 34, dtype)
    kept = [Canary(t) for t in data]
    assert_matches(results(cpp, *(c.inner for c in kept)), data, dtype)
    for canary, original in zip(kept, data, strict=True):
        canary.assert_untouched()
        assert torch.equal(canary.inner, original)
    halves = torch.cat([gate, up], 1).chunk(2, -1)
    assert_matches(results(cpp, *halves, grad), data, dtype)
    assert_matches(results(cpp, gate.T.contiguous().T, up, grad), data, dtype)
    ones = gate.new_ones(()).expand(12, 34)
    assert_matches(results(cpp, gate, up, ones), (gate, up, ones), dtype)
    three = cpp(gate.view(3, 4, 34), up.view(3, 4, 34))
    assert three.shape == (3, 4, 34) and torch.equal(three.view(12, 34), cpp(gate, up))
    assert torch.equal(cpp(gate[0], up[0]), cpp(gate, up)[0])
    assert cpp(gate[:, :0], up[:, :0]).shape == (12, 0)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["gate", "up"])
def test_only_what_is_needed_is_computed(needs: tuple[bool, bool]) -> None:
    gate, up, grad = problem(20, 24, FP32)
    both = results(cpp, gate, up, grad)[1:]
    gate, up = gate.requires_grad_(needs[0]), up.requires_grad_(needs[1])
    cpp(gate, up).backward(grad)
    for leaf, need, expected in zip((gate, up), needs, both, strict=True):
        assert (leaf.grad is None) == (not need)
        assert leaf.grad is None or torch.equal(leaf.grad, expected)
    found = swiglu_bwd(grad, gate.detach(), up.detach(), *needs)
    assert [t.numel() > 0 for t in found] == list(needs)


def test_only_gate_and_up_are_kept() -> None:
    gate, up = (torch.randn(6, 32, requires_grad=True) for _ in range(2))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        cpp(gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])


def test_sabotage_is_caught() -> None:
    """Four tolerances beside the truth, in each result."""
    data = problem(8, 64, FP32)
    good = results(cpp, *data)
    for i in range(3):
        bad = [t.clone() for t in good]
        bad[i].view(-1)[0] += 1e-5 * bad[i].abs().max()
        with pytest.raises(AssertionError, match="error"):
            assert_matches((bad[0], bad[1], bad[2]), data, FP32)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_opcheck_and_compile(dtype: torch.dtype) -> None:
    gate, up, grad = problem(6, 40, dtype)
    torch.library.opcheck(swiglu_fwd, (gate.clone().requires_grad_(), up.clone().requires_grad_()))
    torch.library.opcheck(swiglu_bwd, (grad, gate, up, False, True))
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    eager, traced = results(swiglu, gate, up, grad), results(compiled, gate, up, grad)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_workspace_is_only_the_copies_of_strided_columns() -> None:
    gate, up, grad = problem(6, 40, FP32)
    apart = gate.T.contiguous().T
    assert workspace_bytes(swiglu_fwd._opoverload, gate, up) == 0
    assert workspace_bytes(swiglu_fwd._opoverload, apart, up) == 4 * 6 * 40
    assert workspace_bytes(swiglu_bwd._opoverload, grad, apart, up, True, True) == 4 * 6 * 40


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"up": torch.ones(3, 5)}, ValueError, r"\(3, 5\)"),
        ({"gate": torch.ones(()), "up": torch.ones(())}, ValueError, "shape"),
        ({"up": torch.ones(3, 4, dtype=BF16)}, TypeError, "one floating dtype"),
        ({"up": torch.ones(3, 4, device="meta")}, ValueError, "meta"),
        ({"backend": "triton"}, ValueError, "backend"),
    ],
)
def test_wrong_arguments_are_named(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"gate": torch.ones(3, 4), "up": torch.ones(3, 4)} | change
    with pytest.raises(error, match=message):
        swiglu(**arguments)
