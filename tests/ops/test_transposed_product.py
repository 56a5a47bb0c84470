"""a^T b through transposed strips, as on CPUs with AMX; here on any CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastpost_kernels import _transposed_product as module
from fastpost_kernels import linear_cross_entropy, reference
from fastpost_kernels._csrc import library
from fastpost_kernels.testing import assert_close_to_reference

BF16 = torch.bfloat16

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(library() is None, reason="the compiled library is not built"),
]


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of all copied strips, on a CPU that seems to have AMX; strips of 64 columns."""
    seen: list[tuple[int, ...]] = []
    original = module.transposed
    monkeypatch.setattr(module, "STRIP", 64)
    monkeypatch.setattr(module, "has_matrix_unit", lambda: True)
    monkeypatch.setattr(
        module, "transposed", lambda m: (seen.append(tuple(m.shape)), original(m))[1]
    )
    yield seen


@pytest.mark.parametrize("cols", [64, 65, 200])
@pytest.mark.parametrize("rows", [1, 33, 70])
def test_strips_make_up_the_product(rows: int, cols: int, strips: list[tuple[int, ...]]) -> None:
    """Views with longer rows, as tiles are; a last strip that is narrower."""
    a = torch.randn(rows, cols + 40).to(BF16)[:, :cols]
    b, out = torch.randn(rows, 48).to(BF16), torch.empty(cols, 48, dtype=BF16)
    module.transposed_product(a, b, out)
    assert [shape[1] for shape in strips] == [64] * (cols // 64) + [cols % 64] * bool(cols % 64)
    truth = a.double().t() @ b.double()
    assert_close_to_reference(out, truth, a.t() @ b, BF16)
    out[cols // 2, 7] += 4 * truth.abs().max() * 2**-7
    with pytest.raises(AssertionError, match="product"):
        assert_close_to_reference(out, truth, a.t() @ b, BF16, "product")


@pytest.mark.parametrize("case", ["no AMX", "narrow", "fp32"])
def test_the_librarys_own_product_serves_the_rest(
    case: str, strips: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "no AMX":
        monkeypatch.setattr(module, "has_matrix_unit", lambda: False)
    dtype = torch.float32 if case == "fp32" else BF16
    a = torch.randn(50, 63 if case == "narrow" else 128).to(dtype)
    b = torch.randn(50, 16).to(dtype)
    out = torch.empty(a.shape[1], 16, dtype=dtype)
    module.transposed_product(a, b, out)
    assert torch.equal(out, a.t() @ b) and not strips


def test_a_trained_head_takes_the_strips(strips: list[tuple[int, ...]]) -> None:
    """Both ways to the weight's gradient, with the logits kept and computed again."""
    hidden, weight = torch.randn(40, 32).to(BF16), (0.3 * torch.randn(150, 32)).to(BF16)
    targets = torch.randint(0, 150, (40,))

    def gradients(dtype: torch.dtype, **options: object) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        if options:
            loss = linear_cross_entropy(*inputs, targets, reduction="sum", **options).loss
        else:
            loss = reference.linear_cross_entropy(*inputs, targets)
        return list(torch.autograd.grad(loss, inputs))

    truth, rough = gradients(torch.float64), gradients(BF16)
    for budget in (1 << 20, 40 * 512 * 2):
        strips.clear()
        found = gradients(BF16, memory_budget=budget, backend="cpp")
        assert sum(shape[1] for shape in strips) >= 128 and {s[0] for s in strips} == {40}
        for name, *values in zip(("d hidden", "d weight"), found, truth, rough, strict=True):
            assert_close_to_reference(*values, BF16, name)
