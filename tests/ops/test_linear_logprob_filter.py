"""Gradient filtering: what is kept is exact, what is dropped is as small as promised, NaN stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.ops.bench_gradient_filtering import gradients as gradients_of
from bench.ops.bench_gradient_filtering import measure, random_problem
from fastpost_kernels import LoraHead, linear_cross_entropy, linear_logprob
from fastpost_kernels import _vocab_passes as passes_torch
from fastpost_kernels import _vocab_passes_cpp as passes_cpp
from fastpost_kernels import _vocab_passes_triton as passes_triton
from fastpost_kernels._cross_entropy_walks import Objective, forward
from fastpost_kernels._vocab_passes import LogitTransform
from fastpost_kernels._vocab_tiles import Head
from fastpost_kernels.testing import guarded_call

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = ("torch", "cpp", "triton")
EPS = 2.0**-8
ROWS, WIDTH, VOCAB = 24, 32, 3000
NAMES = ("hidden", "weight", "bias", "lora_a", "lora_b")


def peaked(dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows that only like one of the first 40 tokens, each its own; targets among them."""
    hidden = torch.zeros(ROWS, WIDTH)
    hidden[:, :ROWS] = 2.5 * torch.eye(ROWS)
    weight = 0.1 * torch.randn(VOCAB, WIDTH)
    weight[:ROWS, :ROWS] += 4 * torch.eye(ROWS)
    weight[ROWS : 2 * ROWS, :ROWS] += 3.8 * torch.eye(ROWS)
    targets = torch.arange(ROWS)
    targets[::5] = -100
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "targets": targets,
        "bias": torch.zeros(VOCAB, dtype=dtype),
        "lora_a": (0.1 * torch.randn(4, WIDTH)).to(dtype),
        "lora_b": (0.1 * torch.randn(VOCAB, 4)).to(dtype),
    }


def gradients(
    function: str, data: dict[str, Tensor], wanted: tuple[str, ...], **options: Any
) -> dict[str, Tensor]:
    """Of a loss with a different coefficient for every row."""
    leaves = {
        k: v.detach().clone().requires_grad_(k in wanted) for k, v in data.items() if k != "targets"
    }
    lora = LoraHead(leaves.pop("lora_a"), leaves.pop("lora_b"), 0.5)
    options |= {"targets": data["targets"], "lora": lora, **leaves}
    if function == "cross_entropy":
        loss = linear_cross_entropy(**options, reduction="sum").loss
    else:
        outputs = ("entropy", "logsumexp") if function == "entropy" else ()
        found = linear_logprob(**options, outputs=outputs)
        loss = (found.logprob * torch.logspace(-3, 0, ROWS)).sum()
        if found.entropy is not None and found.logsumexp is not None:
            loss = loss + (0.1 * found.entropy + 0.01 * found.logsumexp).sum()
    leaves |= {"lora_a": lora.a, "lora_b": lora.b}
    grads = torch.autograd.grad(loss, [leaves[k] for k in wanted])
    return dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("wanted", [NAMES, ("hidden", "lora_a", "lora_b"), ("weight",)])
@pytest.mark.parametrize("function", ["logprob", "entropy", "cross_entropy"])
@pytest.mark.parametrize(
    ("backend", "budget"), [("torch", None), ("torch", 60_000), ("cpp", None), ("triton", None)]
)
def test_what_is_dropped_is_below_the_threshold(
    backend: str, function: str, wanted: tuple[str, ...], budget: int | None
) -> None:
    """No sum of dropped terms exceeds eps times what each may weigh; kept columns are the same."""
    data, settings = peaked(FP32), {"backend": backend, "memory_budget": budget}
    full = gradients(function, data, wanted, **settings)
    some = gradients(function, data, wanted, filter_eps=EPS, **settings)
    for name in wanted:
        error = (some[name] - full[name]).abs().max() / full[name].abs().max()
        assert error < 20 * EPS, name
    if "weight" in wanted:
        kept = some["weight"].abs().sum(1) > 0
        assert kept.sum() < VOCAB / 4, "nothing was filtered"
        assert kept[data["targets"][data["targets"] >= 0]].all()
        close = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(some["weight"][kept], full["weight"][kept], **close)
        dropped = full["weight"][~kept].abs().max()
        assert dropped <= ROWS * EPS * data["hidden"].abs().max()
        assert dropped > 0
    if "bias" in wanted:  # sums of tiles, never filtered
        torch.testing.assert_close(some["bias"], full["bias"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", ["logprob", "cross_entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_and_an_fp32_head_under_bf16_gemms(backend: str, function: str) -> None:
    data = peaked(BF16)
    data["weight"] = data["weight"].float()
    wanted = ("hidden", "weight", "lora_b")
    full = gradients(function, data, wanted, backend=backend)
    some = gradients(function, data, wanted, filter_eps=EPS, backend=backend)
    for name in wanted:
        assert some[name].dtype == data[name].dtype
        assert (some[name] - full[name]).norm() < 20 * EPS * full[name].norm()


def test_no_threshold_drops_nothing_on_flat_rows() -> None:
    """Uniform rows are all alike: a threshold below 1 / V keeps every column, to the last bit."""
    data = peaked(FP32)
    data["weight"].fill_(0.01), data["lora_b"].zero_()
    full = gradients("logprob", data, ("hidden", "weight"))
    some = gradients("logprob", data, ("hidden", "weight"), filter_eps=0.1 / VOCAB)
    for name in full:
        assert torch.equal(some[name], full[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_is_never_filtered(backend: str) -> None:
    data = peaked(FP32)
    data["hidden"][1, 3] = float("nan")
    grads = gradients("logprob", data, NAMES, backend=backend, filter_eps=EPS)
    assert grads["hidden"].isnan().any(1).tolist() == [row == 1 for row in range(ROWS)]
    assert grads["weight"].isnan().any()


def test_a_row_without_a_gradient_filters_nothing_in() -> None:
    """Zero incoming gradients divide nothing by zero, and drop every column of their row."""
    data = peaked(FP32)
    weight = data["weight"].requires_grad_()
    logprob = linear_logprob(data["hidden"], weight, data["targets"], filter_eps=EPS).logprob
    factors = torch.zeros(ROWS)
    factors[7] = 1
    (grad,) = torch.autograd.grad((logprob * factors).sum(), weight)
    assert torch.isfinite(grad).all()
    assert 0 < (grad.abs().sum(1) > 0).sum() <= 64


def test_cross_entropy_of_a_frozen_head_keeps_its_logits_to_filter() -> None:
    """One GEMM for the logits and a share of one for d hidden, against the frozen head's two."""
    data = peaked(FP32)
    tensors = [data[name] for name in ("hidden", "weight", "bias", "targets")]
    settings = (LogitTransform(), "torch", FP32, 1 << 24)
    flops, found = [], []
    for eps in (None, EPS):
        head = Head(*tensors, *settings, filter_eps=eps)
        with FlopCounterMode(display=False) as executed:
            result = forward(head, Objective(0.0, 0.0, torch.ones(())), (), (True, False, False))
        flops.append(executed.get_total_flops())
        found.append(result.gradients.hidden)
    logits = 2 * (data["targets"] >= 0).sum() * WIDTH * VOCAB
    assert flops[0] == 2 * logits
    assert logits < flops[1] < 1.1 * logits
    assert 0 < (found[1] - found[0]).norm() < 20 * EPS * found[0].norm()


@pytest.mark.parametrize("shape", [(1, 1), (17, 130), (40, 2500)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_significant_columns_of_every_backend(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The same marks, whatever the stride; values at the threshold itself are small."""
    tile = (0.3 * torch.randn(shape)).to(dtype)
    tile[-1, -1], tile[0, 0] = float("nan"), 1.0
    factors = torch.rand(shape[0]) * 2
    factors[0] = 1.0
    factors = factors.to(BF16).float()  # so that all compare the same numbers
    wide = torch.full((shape[0], shape[1] + 7), 9.0, dtype=dtype)
    wide[:, : shape[1]] = tile
    expected = ((tile * factors.to(dtype)[:, None]).abs() <= 1).logical_not().any(0)
    for passes in (passes_torch, passes_cpp):
        assert torch.equal(passes.significant(wide[:, : shape[1]], factors), expected)
    marks = passes_triton.significant(wide[:, : shape[1]], factors)
    exact = ((tile.float() * factors[:, None]).abs() <= 1).logical_not().any(0)
    assert torch.equal(marks, exact)


def test_the_triton_pass_stays_inside_its_buffers() -> None:
    """A guard that is read is large enough to mark its column."""
    tile, factors, marks = torch.zeros(19, 600, dtype=BF16), torch.ones(19), torch.zeros(600)
    kernel = passes_triton._linear_logprob_significant_kernel[(19, 5)]
    marks = marks.to(torch.int8)
    guarded_call(kernel, tile, factors, marks, 600, 600, BLOCK_V=128)
    assert not marks.any()


@pytest.mark.parametrize(("deviation", "least", "most"), [(0.3, 0.95, 1.0), (2.0, 0.3, 0.6)])
def test_the_benchmark_measures_shares_and_errors(
    deviation: float, least: float, most: float
) -> None:
    """Flat rows lose all columns but their targets'; the errors are of what was lost."""
    problem = random_problem(40, deviation, width=16, vocab=8192)
    truth = list(gradients_of(problem, FP32, None))
    found = measure(problem, FP32, 2.0**-10, truth)
    assert least < found.columns < most
    assert 0 < found.error_hidden < 1 and 0 < found.error_weight < 1
    assert found.blocks <= found.columns
    exact = measure(problem, FP32, None, truth)
    assert exact == (0, 0, 0, 0)


@pytest.mark.parametrize("eps", [0.0, 1.0, -0.1, float("nan")])
@pytest.mark.parametrize("function", [linear_logprob, linear_cross_entropy])
def test_wrong_thresholds_are_named(function: Any, eps: float) -> None:
    with pytest.raises(ValueError, match="filter_eps"):
        function(torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, 1, 2]), filter_eps=eps)


def test_smoothing_would_be_filtered_away() -> None:
    args = torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1"):
        linear_cross_entropy(*args, filter_eps=EPS, label_smoothing=0.1)
