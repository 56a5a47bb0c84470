"""linear_cross_entropy against the float64 reference: loss and gradients of every strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost_kernels import linear_cross_entropy, linear_logprob, reference
from fastpost_kernels._cross_entropy_walks import plan
from fastpost_kernels._kept_buffer import release_kept_buffers
from fastpost_kernels.testing import assert_close_to_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BACKENDS = [
    pytest.param("torch", FP64, id="torch-fp64"),
    *(
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype)[6:]}")
        for backend in ("torch", "cpp", "triton")
        for dtype in (FP32, BF16)
    ),
]
EVERYTHING = {
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "temperature": 0.7,
    "softcap": 5.0,
    "logit_scale": 1.3,
}
TRAINED = ("hidden", "weight", "bias")
# (what is trained, options, budget): each row runs another strategy
STRATEGIES = [
    pytest.param(("hidden",), {"z_loss": 0.1, "softcap": 5.0}, None, id="frozen"),
    pytest.param(("hidden",), EVERYTHING, None, id="frozen-smoothed"),
    pytest.param(TRAINED, {}, None, id="resident"),
    pytest.param(TRAINED, EVERYTHING, None, id="resident-everything"),
    pytest.param(TRAINED, EVERYTHING, 9000, id="recompute-everything"),
    pytest.param(("weight",), {}, None, id="weight-alone"),
]


def problem(rows: int, width: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    targets = torch.randint(0, vocab, (rows,))
    targets[::3] = -100
    return {
        "hidden": torch.randn(rows, width).to(dtype),
        "weight": torch.randn(vocab, width).to(dtype),
        "targets": targets,
        "bias": torch.randn(vocab).to(dtype),
    }


def reference_loss(
    data: dict[str, Tensor], dtype: torch.dtype, wanted: tuple[str, ...], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in data.items() if k != "targets"}
    loss = reference.linear_cross_entropy(targets=data["targets"], **leaves, **options) / 7
    grads = torch.autograd.grad(3 * loss, [leaves[k] for k in wanted])
    return loss, dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize(("wanted", "options", "budget"), STRATEGIES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_matches_reference(
    backend: str,
    dtype: torch.dtype,
    wanted: tuple[str, ...],
    options: dict[str, float],
    budget: int | None,
) -> None:
    """Loss / 7 times 3: the division inside, the factor from the incoming gradient."""
    data = problem(20, 24, 1009, dtype)
    leaves = {
        k: v.detach().clone().requires_grad_(k in wanted) for k, v in data.items() if k != "targets"
    }
    got = linear_cross_entropy(
        targets=data["targets"],
        **leaves,
        num_items=7,
        backend=backend,
        memory_budget=budget,
        **options,
    )
    grads = torch.autograd.grad(3 * got.loss, [leaves[k] for k in wanted])
    truth, true_grads = reference_loss(data, FP64, wanted, **options)
    rough, rough_grads = reference_loss(data, dtype, wanted, **options)
    assert_close_to_reference(got.loss, truth, rough, dtype, "loss")
    for name, grad in zip(wanted, grads, strict=True):
        assert_close_to_reference(grad, true_grads[name], rough_grads[name], dtype, name)


@pytest.mark.parametrize(
    ("needs", "smoothing", "budget", "expected"),
    [
        ((False, False, False), 0.0, 1, "fold"),
        ((True, False, False), 0.0, 1, "frozen"),
        ((True, False, False), 0.1, 10**6, "resident"),
        ((True, True, False), 0.0, 8 * 128 * 4, "resident"),
        ((True, True, False), 0.0, 8 * 128 * 4 - 1, "recompute"),
    ],
)
def test_strategy_follows_gradients_and_budget(
    needs: tuple[bool, bool, bool], smoothing: float, budget: int, expected: str
) -> None:
    assert plan(8, 100, 4, smoothing, needs, budget) == expected


def test_statistics_equal_linear_logprob() -> None:
    data = problem(20, 24, 1009, FP32)
    loss = linear_cross_entropy(**data, outputs=("entropy", "is_top1"))
    rows = linear_logprob(**data, outputs=("entropy", "is_top1"))
    assert torch.equal(loss.logprob, rows.logprob)
    assert loss.entropy is not None and torch.equal(loss.entropy, rows.entropy)
    assert loss.is_top1 is not None and torch.equal(loss.is_top1, rows.is_top1)
    scored = (data["targets"] != -100).sum()
    torch.testing.assert_close(loss.loss, -rows.logprob.sum() / scored, rtol=1e-6, atol=0)


def test_mask_sum_and_num_items() -> None:
    """loss_mask equals targets of -100, a tensor of items the number, sum is mean * items."""
    data = problem(12, 16, 300, FP32)
    mask = torch.arange(12) % 2 == 0
    masked = data | {"targets": data["targets"].where(mask, -100)}
    mean = linear_cross_entropy(**masked).loss
    count = (masked["targets"] != -100).sum()
    assert torch.equal(linear_cross_entropy(**data, loss_mask=mask).loss, mean)
    assert torch.equal(linear_cross_entropy(**masked, num_items=count).loss, mean)
    total = linear_cross_entropy(**masked, reduction="sum").loss
    torch.testing.assert_close(total / count, mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [0, 5])
def test_no_scored_row_gives_a_differentiable_zero(rows: int) -> None:
    leaves = [torch.randn(rows, 8), torch.randn(50, 8), torch.randn(50)]
    hidden, weight, bias = (x.requires_grad_() for x in leaves)
    targets = torch.full((rows,), -100)
    result = linear_cross_entropy(hidden, weight, targets, bias)
    assert result.loss.item() == 0
    result.loss.backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None and not leaf.grad.any()


def test_the_kept_buffer_carries_nothing_over() -> None:
    """Smaller, larger and equal problems in turn give what each gives alone."""
    for rows in (20, 8, 40, 40):
        data = problem(rows, 24, 1009, FP32)
        results = []
        for forget in (False, True):
            if forget:
                release_kept_buffers()
            weight = data["weight"].detach().requires_grad_()
            linear_cross_entropy(data["hidden"], weight, data["targets"]).loss.backward()
            results.append(weight.grad)
        assert torch.equal(*results)


def test_second_backward_gives_the_same_gradient() -> None:
    """Also after the first gradient was accumulated into: what is saved stays private."""
    data = problem(10, 16, 300, FP32)
    weight = data["weight"].requires_grad_()
    loss = linear_cross_entropy(data["hidden"], weight, data["targets"]).loss
    loss.backward(retain_graph=True)
    assert weight.grad is not None
    first = weight.grad.clone()
    weight.grad.mul_(100)
    weight.grad = None
    loss.backward()
    assert torch.equal(weight.grad, first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"z_loss": -0.1}, "z_loss"),
        ({"reduction": "none"}, "linear_logprob"),
        ({"reduction": "sum", "num_items": 3}, "leave it out"),
        ({"num_items": 0}, "positive"),
        ({"num_items": torch.ones(2)}, "scalar"),
        ({"loss_mask": torch.ones(3)}, "bool"),
        ({"outputs": ("logsumexp",)}, "logsumexp"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(good | change))
