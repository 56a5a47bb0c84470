"""linear_logprob against the float64 reference: values and all gradients, every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpost_kernels import linear_cross_entropy, linear_logprob, reference
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
VALUES = ("logprob", "entropy", "log_sum_sq_probs", "mean_logits", "logsumexp")
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "logsumexp")
TRANSFORMED = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}


def problem(
    rows: int, width: int, vocab: int, dtype: torch.dtype, masked: str = "some", scale: float = 1.0
) -> dict[str, Tensor]:
    """Random hidden, weight, bias and targets; `masked` is "none", "some" or "all"."""
    targets = torch.randint(0, vocab, (rows,))
    if masked == "some":
        targets[::3] = -100
    if masked == "all":
        targets[:] = -100
    return {
        "hidden": (scale * torch.randn(rows, width)).to(dtype),
        "weight": torch.randn(vocab, width).to(dtype),
        "targets": targets,
        "bias": torch.randn(vocab).to(dtype),
    }


def reference_gradients(
    data: dict[str, Tensor], dtype: torch.dtype, seeds: dict[str, Tensor], **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and gradients of sum(seed * output) by the reference in `dtype`."""
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in data.items() if k != "targets"}
    values = reference.linear_logprob(targets=data["targets"], **leaves, **options)
    loss = sum((values[name] * seed.to(dtype)).sum() for name, seed in seeds.items())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return values, dict(zip(leaves, grads, strict=True))


def check(
    data: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    backend: str,
    trained: bool,
    differentiated: tuple[str, ...] = ("logprob",),
    memory_budget: int | None = None,
    values: tuple[str, ...] = VALUES,
    **options: Any,
) -> None:
    """Values and gradients of one call against the reference."""
    wanted = ("hidden", "weight", "bias") if trained else ("hidden",)
    leaves = {
        k: v.detach().clone().requires_grad_(k in wanted) for k, v in data.items() if k != "targets"
    }
    got = linear_logprob(
        targets=data["targets"],
        **leaves,
        outputs=OUTPUTS,
        backend=backend,
        memory_budget=memory_budget,
        **options,
    )._asdict()
    seeds = {name: torch.randn(len(data["targets"])) for name in differentiated}
    loss = sum((got[name] * seed).sum() for name, seed in seeds.items())
    grads = dict(zip(wanted, torch.autograd.grad(loss, [leaves[k] for k in wanted]), strict=True))
    truth, true_grads = reference_gradients(data, FP64, seeds, **options)
    rough, rough_grads = reference_gradients(data, dtype, seeds, **options)
    for name in values:
        assert_close_to_reference(got[name], truth[name], rough[name], dtype, name)
    for name in wanted:
        assert grads[name].dtype == data[name].dtype
        assert_close_to_reference(grads[name], true_grads[name], rough_grads[name], dtype, name)
    assert torch.equal(got["is_top1"], truth["is_top1"]) or dtype == BF16


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", [{}, TRANSFORMED], ids=["plain", "transformed"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_matches_reference(
    backend: str, dtype: torch.dtype, options: dict[str, float], trained: bool
) -> None:
    """Several row chunks and vocabulary tiles with ragged tails: V 1009 in tiles of 512."""
    data = problem(21, 24, 1009, dtype)
    check(data, dtype, backend=backend, trained=trained, memory_budget=9000, **options)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_entropy_and_logsumexp_gradients(backend: str, dtype: torch.dtype, trained: bool) -> None:
    """All three differentiable outputs at once; a frozen head then recomputes in the backward."""
    check(
        problem(9, 16, 521, dtype),
        dtype,
        backend=backend,
        trained=trained,
        differentiated=("logprob", "entropy", "logsumexp"),
        **TRANSFORMED,
    )


@given(
    rows=st.sampled_from([0, 1, 2, 17]),
    width=st.sampled_from([1, 7, 33]),
    vocab=st.sampled_from([1, 7, 64, 512, 513, 1009, 4097]),
    masked=st.sampled_from(["none", "some", "all"]),
    budget=st.sampled_from([1, 5000, None]),
    backend=st.sampled_from(["torch", "cpp", "triton"]),
    trained=st.booleans(),
)
def test_ragged_shapes(
    rows: int,
    width: int,
    vocab: int,
    masked: str,
    budget: int | None,
    backend: str,
    trained: bool,
) -> None:
    data = problem(rows, width, vocab, FP32, masked)
    check(data, FP32, backend=backend, trained=trained, memory_budget=budget)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_peaked_logits(backend: str, dtype: torch.dtype) -> None:
    """Blocks whose maxima differ by 80, the largest last: accumulators must be rescaled."""
    data = problem(8, 16, 1537, dtype, "none")
    data["bias"] = torch.zeros(1537)
    data["bias"][:512], data["bias"][512:1024], data["bias"][1024:] = -40, 10, 40
    data["targets"][:4] = torch.tensor([0, 511, 1024, 1536])
    data["bias"] = data["bias"].to(dtype)
    check(data, dtype, backend=backend, trained=False, memory_budget=4000)
    check(
        data,
        dtype,
        backend=backend,
        trained=True,
        differentiated=("logprob", "entropy"),
        memory_budget=4000,
    )


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_confident_target_keeps_its_digits(backend: str) -> None:
    """p(target) = 1 - 1e-6 in bf16: the gradient is 1 - p, not a rounding of p."""
    hidden = torch.zeros(1, 8, dtype=BF16)
    hidden[0, 0] = 1
    weight = torch.zeros(100, 8, dtype=BF16)
    weight[3, 0] = 18.5
    targets = torch.tensor([3])
    leaf = hidden.clone().requires_grad_()
    linear_logprob(leaf, weight, targets, backend=backend).logprob.sum().backward()
    _, grads = reference_gradients(
        {"hidden": hidden, "weight": weight, "targets": targets, "bias": torch.zeros(100)},
        FP64,
        {"logprob": torch.ones(1)},
    )
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[0, 0].double(), grads["hidden"][0, 0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_ties_go_to_the_first_maximum(backend: str, dtype: torch.dtype) -> None:
    """Equal rows of the head in different tiles: only the first of them is top-1."""
    weight = torch.randn(1100, 16).to(dtype)
    hidden = torch.randn(3, 16).to(dtype)
    best = (hidden.float() @ weight.float().T).argmax(-1)[0]
    for copy in (5, 600, 1099):
        weight[copy] = weight[best] * 2
    hidden = hidden[:1].expand(3, -1)
    targets = torch.tensor([5, 600, 1099])
    got = linear_logprob(
        hidden, weight, targets, outputs=("is_top1",), backend=backend, memory_budget=3000
    )
    assert got.is_top1 is not None
    assert got.is_top1.tolist() == [True, False, False]


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_bf16_extremes(backend: str) -> None:
    """Logits of 1e5: finite everywhere. (Entropies are zero to the last bit, so not compared.)"""
    data = problem(6, 8, 300, BF16, "none", scale=1e4)
    values = ("logprob", "logsumexp", "mean_logits")
    check(data, BF16, backend=backend, trained=True, values=values)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_nan_in_a_row_stays_in_that_row(backend: str) -> None:
    data = problem(4, 8, 600, FP32, "none")
    data["hidden"][1, 3] = float("nan")
    leaf = data["hidden"].requires_grad_()
    got = linear_logprob(
        leaf, data["weight"], data["targets"], outputs=("entropy",), backend=backend
    )
    assert got.entropy is not None
    got.logprob.sum().backward()
    assert leaf.grad is not None
    for values in (got.logprob, got.entropy, leaf.grad.sum(1)):
        assert values.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_views_and_mixed_dtypes(trained: bool) -> None:
    """Strided hidden and weight, an fp32 weight under bf16 GEMMs; inputs stay as they were."""
    wide = torch.randn(10, 48)
    hidden, weight = wide[:, ::3], torch.randn(16, 700).T
    targets = torch.randint(0, 700, (20,))[::2]
    before = [x.clone() for x in (hidden, weight, targets)]
    h, w = hidden.requires_grad_(), weight.requires_grad_(trained)
    got = linear_logprob(h, w, targets, compute_dtype=BF16, outputs=("entropy",))
    got.logprob.sum().backward()
    rounded = {"hidden": hidden.detach().to(BF16), "weight": weight.detach().to(BF16)}
    data = rounded | {"targets": targets, "bias": torch.zeros(700)}
    seeds = {"logprob": torch.ones(10)}
    truth, grads = reference_gradients(data, FP64, seeds)
    rough, rough_grads = reference_gradients(data, BF16, seeds)
    assert_close_to_reference(got.logprob, truth["logprob"], rough["logprob"], BF16)
    leaves = {"hidden": h, "weight": w} if trained else {"hidden": h}
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == FP32
        assert_close_to_reference(leaf.grad, grads[name], rough_grads[name], BF16, name)
    for tensor, copy in zip((hidden, weight, targets), before, strict=True):
        assert torch.equal(tensor.detach(), copy)


def test_masked_rows_cost_and_change_nothing() -> None:
    """The scored rows alone give the same bits; masked rows get exact zeros."""
    data = problem(12, 16, 900, FP32, "some")
    keep = data["targets"] != -100
    leaf = data["hidden"].clone().requires_grad_()
    all_rows = linear_logprob(leaf, data["weight"], data["targets"]).logprob
    all_rows.sum().backward()
    few = data["hidden"][keep].clone().requires_grad_()
    scored = linear_logprob(few, data["weight"], data["targets"][keep]).logprob
    scored.sum().backward()
    assert leaf.grad is not None and few.grad is not None
    assert torch.equal(all_rows[keep], scored) and torch.equal(leaf.grad[keep], few.grad)
    assert not all_rows[~keep].any() and not leaf.grad[~keep].any()


def test_row_permutation_permutes_the_result() -> None:
    data = problem(16, 16, 700, FP32, "none")
    order = torch.randperm(16)
    one = linear_logprob(data["hidden"], data["weight"], data["targets"]).logprob
    two = linear_logprob(data["hidden"][order], data["weight"], data["targets"][order]).logprob
    torch.testing.assert_close(one[order], two, rtol=0, atol=2e-6)


def test_autocast_chooses_the_gemm_dtype() -> None:
    data = problem(5, 16, 300, FP32, "none")
    args = data["hidden"], data["weight"], data["targets"]
    with torch.autocast("cpu", dtype=BF16):
        under = linear_logprob(*args).logprob
    assert under.dtype == FP32
    assert torch.equal(under, linear_logprob(*args, compute_dtype=BF16).logprob)
    assert not torch.equal(under, linear_logprob(*args).logprob)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.tensor([0, 7, 1])}, ValueError, r"targets\[1\] = 7"),
        ({"targets": torch.tensor([0, 1, -3])}, ValueError, r"targets\[2\] = -3"),
        ({"targets": torch.tensor([0, 1, -101])}, ValueError, r"targets\[2\] = -101"),
        ({"targets": torch.tensor([0, 1])}, ValueError, r"\[M\] = \[3\]"),
        ({"targets": torch.zeros(3)}, TypeError, "int64"),
        ({"weight": torch.zeros(7, 5)}, ValueError, r"\(7, 5\)"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "empty"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.float16)}, TypeError, "bfloat16"),
        ({"hidden": torch.zeros(1, 3, 4)}, ValueError, "flatten"),
        ({"bias": torch.zeros(6)}, ValueError, r"\[V\] = \[7\]"),
        ({"weight": torch.zeros(7, 4, device="meta")}, ValueError, "meta"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale"),
        ({"outputs": ("entropi",)}, ValueError, "entropi"),
        ({"outputs": "entropy"}, ValueError, "sequence"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"backend": "cpp", "compute_dtype": FP64}, ValueError, "float64"),
        ({"compute_dtype": torch.float16}, TypeError, "float16"),
        ({"memory_budget": 0}, ValueError, "memory_budget"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(error, match=message):
        linear_logprob(**(good | change))


def test_the_yardstick_catches_a_perturbed_result() -> None:
    """Sabotage: four times the tolerance on one element must fail."""
    data = problem(9, 16, 521, FP32, "none")
    truth, _ = reference_gradients(data, FP64, {"logprob": torch.ones(9)})
    rough, _ = reference_gradients(data, FP32, {"logprob": torch.ones(9)})
    got = linear_logprob(**data).logprob
    assert_close_to_reference(got, truth["logprob"], rough["logprob"], FP32)
    spread = (rough["logprob"] - truth["logprob"]).abs().max() * 2
    spoiled = got.clone()
    spoiled[4] += 4 * (spread + 1e-6 * truth["logprob"].abs().max())
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(spoiled, truth["logprob"], rough["logprob"], FP32)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("vocab", [259, 260, 1000, 4099])
def test_nothing_behind_a_partial_tile_is_multiplied_in(backend, vocab, poisoned_memory) -> None:
    """16-bit CPU GEMMs read whole blocks of 32 columns: NaN left in a tile's padding came out."""
    hidden = torch.randn(70, 64).bfloat16().requires_grad_()
    weight = torch.randn(vocab, 64).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (70,))
    for frozen in (False, True):
        head = weight.detach() if frozen else weight
        logprob = linear_logprob(hidden, head, targets, backend=backend).logprob
        loss = linear_cross_entropy(hidden, head, targets, backend=backend).loss
        (logprob.sum() + loss).backward()
        assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()
