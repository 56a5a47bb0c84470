"""linear: torch's own layer with another road to the weight gradient."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fastpost_kernels import linear, workspace_bytes
from fastpost_kernels._csrc import library
from fastpost_kernels.testing import Canary, assert_close_to_reference

# the package's attribute of this name is the function
module = importlib.import_module("fastpost_kernels.linear")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# (leading shape, K, N): tall weights both ways, ragged rows, a batch
SHAPES = [((64,), 64, 128), ((97,), 192, 64), ((130,), 128, 320), ((3, 43), 64, 160)]


@pytest.fixture(autouse=True)
def small_layers_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MIN_WORK", 64 * 64 * 64)
    monkeypatch.setattr(module, "has_matrix_unit", lambda: True)


def results(
    f: object, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor
) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = f(*inputs)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}x{s[2]}")
def test_output_and_gradients(
    shape: tuple[tuple[int, ...], int, int], has_bias: bool, weight_gradients: list[int]
) -> None:
    leading, inputs, outputs = shape
    x, weight = torch.randn(*leading, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if has_bias else None
    grad = torch.randn(*leading, outputs)
    data = [None if t is None else t.to(BF16) for t in (x, weight, bias, grad)]
    got = results(linear, *data)
    assert len(weight_gradients) == 1
    truth, rough = (
        results(functional.linear, *(None if t is None else t.to(kind) for t in data))
        for kind in (FP64, BF16)
    )
    for name, *values in zip(("y", "dx", "dW", "db"), got, truth, rough, strict=False):
        assert_close_to_reference(*values, BF16, name)


@pytest.fixture
def weight_gradients(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every gradient that took our road."""
    seen: list[int] = []
    original = module.transposed
    monkeypatch.setattr(module, "transposed", lambda m: (seen.append(m.shape[0]), original(m))[1])
    return seen


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 95])
@pytest.mark.parametrize("cols", [1, 7, 8, 9, 64, 77])
def test_transposed_is_exact_and_stays_in_its_buffer(rows: int, cols: int) -> None:
    matrix = torch.randn(rows, cols, dtype=BF16)
    for view in (matrix, matrix[::2], matrix.t(), matrix[:, : max(1, cols // 2)]):
        got = module.transposed(view)
        assert torch.equal(got, view.t()) and got.is_contiguous()
    out, lib = Canary(torch.zeros(cols, rows, dtype=BF16)), library()
    assert lib is not None
    lib.fastpost_transpose_16(
        matrix.data_ptr(), cols, rows, cols, out.inner.data_ptr(), out.inner.stride(0), 2
    )
    assert torch.equal(out.inner, matrix.t())
    out.assert_untouched()


def test_results_do_not_depend_on_threads() -> None:
    grad, x = torch.randn(300, 128, dtype=BF16), torch.randn(300, 64, dtype=BF16)
    expected = module.transposed(grad)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(module.transposed(grad), expected)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(expected @ x, module.weight_gradient(grad, x))


@pytest.mark.parametrize(
    "case", ["fp32", "frozen", "few rows", "square", "autocast", "no grad", "fp64"]
)
def test_what_is_not_served_is_torchs_own(case: str, weight_gradients: list[int]) -> None:
    dtype = {"fp32": FP32, "fp64": FP64, "autocast": FP32}.get(case, BF16)
    rows, outputs = (8 if case == "few rows" else 96), (64 if case == "square" else 128)
    x = torch.randn(rows, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(outputs, 64, dtype=dtype, requires_grad=case != "frozen")
    autocast = torch.autocast("cpu", dtype=BF16, enabled=case == "autocast")
    with autocast, torch.set_grad_enabled(case != "no grad"):
        y = linear(x, weight)
        expected = functional.linear(x, weight)
    assert torch.equal(y, expected) and type(y.grad_fn) is type(expected.grad_fn)
    assert not weight_gradients


def test_only_needed_gradients_are_computed(weight_gradients: list[int]) -> None:
    x, weight = torch.randn(96, 64, dtype=BF16), torch.randn(128, 64, dtype=BF16).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 96 * 64 * 128  # y and dW, not dx
    assert weight.grad is not None and weight_gradients == [96]


def test_op_is_registered_whole() -> None:
    grad, x = torch.randn(70, 128, dtype=BF16), torch.randn(70, 64, dtype=BF16)
    torch.library.opcheck(module.weight_gradient, (grad, x))
    assert workspace_bytes(module.weight_gradient._opoverload, grad, x) == grad.numel() * 2


def test_the_tolerance_catches_a_wrong_gradient() -> None:
    grad, x = torch.randn(96, 128, dtype=BF16), torch.randn(96, 64, dtype=BF16)
    truth, rough = grad.double().t() @ x.double(), grad.t() @ x
    wrong = module.weight_gradient(grad, x).clone()
    wrong[5, 7] += 4.0
    with pytest.raises(AssertionError, match="dW"):
        assert_close_to_reference(wrong, truth, rough, BF16, "dW")
