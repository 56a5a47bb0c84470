"""An adapter on the head, against the float64 reference: values, every gradient, cost, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpost_kernels import LoraHead, linear_cross_entropy, linear_logprob, reference
from fastpost_kernels._cross_entropy_walks import MIN_RESIDENT_ROWS, resident_rows
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
TRANSFORMED = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}
SCALE = 0.6  # no power of two
# what is trained: nothing of the head, a usual adapter, LoRA-FA, an adapter alone, everything
TRAINED = {
    "frozen": ("hidden",),
    "adapter": ("hidden", "lora_a", "lora_b"),
    "b-alone": ("hidden", "lora_b"),
    "no-hidden": ("lora_a", "lora_b"),
    "all": ("hidden", "weight", "bias", "lora_a", "lora_b"),
}


def problem(
    rows: int, width: int, vocab: int, rank: int, dtype: torch.dtype, masked: str = "some"
) -> dict[str, Tensor]:
    targets = torch.randint(0, vocab, (rows,))
    targets[:: {"none": rows + 1, "some": 3, "all": 1}[masked]] = -100
    return {
        "hidden": (2 * torch.randn(rows, width) / width**0.5).to(dtype),
        "weight": torch.randn(vocab, width).to(dtype),
        "targets": targets,
        "bias": torch.randn(vocab).to(dtype),
        # the adapter contributes as much as the weight: leaving it out anywhere must show
        "lora_a": torch.randn(rank, width).to(dtype),
        "lora_b": (torch.randn(vocab, rank) / rank**0.5).to(dtype),
    }


def call(function: Any, leaves: dict[str, Tensor], targets: Tensor, **options: Any) -> Any:
    rest = {k: v for k, v in leaves.items() if not k.startswith("lora")}
    lora = (leaves["lora_a"], leaves["lora_b"], SCALE)
    if function in (linear_logprob, linear_cross_entropy):
        lora = LoraHead(*lora)
    return function(targets=targets, **rest, lora=lora, **options)


def leaves_of(data: dict[str, Tensor], dtype: torch.dtype, wanted: tuple[str, ...]) -> Any:
    return {
        name: value.detach().to(dtype).clone().requires_grad_(name in wanted)
        for name, value in data.items()
        if name != "targets"
    }


def weighted(outputs: dict[str, Tensor], seeds: dict[str, Tensor]) -> Tensor:
    return torch.stack(
        [(outputs[k] * v.to(outputs[k].dtype)).sum() for k, v in seeds.items()]
    ).sum()


def check(
    data: dict[str, Tensor],
    dtype: torch.dtype,
    wanted: tuple[str, ...],
    differentiated: tuple[str, ...] = ("logprob",),
    *,
    backend: str,
    memory_budget: int | None = None,
    **options: Any,
) -> None:
    """Values and gradients of `linear_logprob` for random incoming gradients."""
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "logsumexp")
    targets = data["targets"]
    seeds = {name: torch.randn(len(targets)) for name in differentiated}
    leaves = leaves_of(data, dtype, wanted)
    settings = {"backend": backend, "memory_budget": memory_budget, "outputs": names}
    got = call(linear_logprob, leaves, targets, **settings, **options)._asdict()
    grads = torch.autograd.grad(weighted(got, seeds), [leaves[k] for k in wanted])
    found = []
    for precision in (FP64, dtype):
        leaves = leaves_of(data, precision, wanted)
        values = call(reference.linear_logprob, leaves, targets, **options)
        found.append(
            (values, torch.autograd.grad(weighted(values, seeds), [*map(leaves.get, wanted)]))
        )
    (truth, true_grads), (rough, rough_grads) = found
    for name in ("logprob", *names):
        assert_close_to_reference(got[name], truth[name], rough[name], dtype, name)
    for name, *three in zip(wanted, grads, true_grads, rough_grads, strict=True):
        assert three[0].dtype == dtype
        assert_close_to_reference(*three, dtype, f"d {name}")


@pytest.mark.parametrize("wanted", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_matches_reference(backend: str, dtype: torch.dtype, wanted: tuple[str, ...]) -> None:
    """Several row chunks and vocabulary tiles with ragged tails; rank 5 is no multiple of 8."""
    data = problem(21, 24, 1009, 5, dtype)
    check(data, dtype, wanted, backend=backend, memory_budget=9000, **TRANSFORMED)


@pytest.mark.parametrize("mode", ["frozen", "adapter"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_entropy_and_logsumexp_gradients(backend: str, dtype: torch.dtype, mode: str) -> None:
    data = problem(9, 16, 521, 8, dtype)
    check(data, dtype, TRAINED[mode], ("logprob", "entropy", "logsumexp"), backend=backend)


@given(
    rows=st.sampled_from([0, 1, 17]),
    width=st.sampled_from([7, 33]),
    vocab=st.sampled_from([1, 64, 513, 4097]),
    rank=st.sampled_from([3, 16]),
    masked=st.sampled_from(["none", "some", "all"]),
    budget=st.sampled_from([1, 5000, None]),
    backend=st.sampled_from(["torch", "cpp", "triton"]),
    wanted=st.sampled_from([*TRAINED.values()]),
)
def test_ragged_shapes(
    rows: int,
    width: int,
    vocab: int,
    rank: int,
    masked: str,
    budget: int | None,
    backend: str,
    wanted: tuple[str, ...],
) -> None:
    data = problem(rows, width, vocab, rank, FP32, masked)
    check(data, FP32, wanted, backend=backend, memory_budget=budget)


@pytest.mark.parametrize("budget", [None, 9000], ids=["resident", "recompute"])
@pytest.mark.parametrize("mode", ["frozen", "adapter", "all"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_cross_entropy_matches_reference(
    backend: str, dtype: torch.dtype, mode: str, budget: int | None
) -> None:
    wanted = TRAINED[mode]
    data = problem(20, 24, 1009, 5, dtype)
    options = {"z_loss": 0.01, **TRANSFORMED}
    if mode != "frozen":  # with smoothing it is computed as a trained one is
        options["label_smoothing"] = 0.1
    targets = data["targets"]
    leaves = leaves_of(data, dtype, wanted)
    settings = {"num_items": 7, "backend": backend, "memory_budget": budget}
    loss = call(linear_cross_entropy, leaves, targets, **settings, **options).loss
    grads = torch.autograd.grad(3 * loss, [leaves[k] for k in wanted])
    found = []
    for precision in (FP64, dtype):
        leaves = leaves_of(data, precision, wanted)
        value = call(reference.linear_cross_entropy, leaves, targets, **options) / 7
        found.append((value, torch.autograd.grad(3 * value, [leaves[k] for k in wanted])))
    (truth, true_grads), (rough, rough_grads) = found
    assert_close_to_reference(loss, truth, rough, dtype, "loss")
    for name, *three in zip(wanted, grads, true_grads, rough_grads, strict=True):
        assert_close_to_reference(*three, dtype, f"d {name}")


def test_chunks_of_kept_logits_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen weight keeps the logits of as many rows as the budget holds: 3 chunks, 2 GEMMs."""
    monkeypatch.setattr("fastpost_kernels._cross_entropy_walks.MIN_RESIDENT_ROWS", 4)
    wanted = TRAINED["adapter"]
    data = problem(20, 24, 1000, 5, FP32, "none")
    results = []
    for budget in (None, 7 * 1024 * 4):
        leaves = leaves_of(data, FP32, wanted)
        found = call(linear_cross_entropy, leaves, data["targets"], memory_budget=budget)
        results.append(
            (
                found.loss,
                found.logprob,
                *torch.autograd.grad(found.loss, [*map(leaves.get, wanted)]),
            )
        )
    assert resident_rows(20, 1000, 4, False, 7 * 1024 * 4) == 7
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "fitting", "need_weight", "expected"),
    [
        (300, 300, True, 300),
        (300, 299, True, 0),
        (300, 299, False, 0),
        (MIN_RESIDENT_ROWS + 1, MIN_RESIDENT_ROWS, True, 0),
        (MIN_RESIDENT_ROWS + 1, MIN_RESIDENT_ROWS, False, MIN_RESIDENT_ROWS // 2 + 1),
        (0, 0, False, 0),
    ],
)
def test_kept_rows_follow_the_budget(
    rows: int, fitting: int, need_weight: bool, expected: int
) -> None:
    """Chunks of equal size; with d weight all rows or none."""
    assert resident_rows(rows, 64, 4, need_weight, fitting * 64 * 4) == expected


def test_bf16_gemms_of_an_fp32_adapter_under_autocast() -> None:
    """PEFT keeps adapters in fp32 beside a bf16 model: gradients come in the adapter's dtype."""
    wanted = TRAINED["adapter"]
    data = problem(12, 16, 700, 4, BF16)
    leaves = leaves_of(data, BF16, wanted)
    leaves |= {k: v for k, v in leaves_of(data, FP32, wanted).items() if k.startswith("lora")}
    got = call(linear_logprob, leaves, data["targets"], backend="cpp").logprob
    grads = torch.autograd.grad(got.sum(), [leaves[k] for k in wanted])
    assert [g.dtype for g in grads] == [BF16, FP32, FP32]
    found = []
    for precision in (FP64, BF16):
        same = leaves_of(data, precision, wanted)
        values = call(reference.linear_logprob, same, data["targets"])["logprob"]
        found.append(torch.autograd.grad(values.sum(), [same[k] for k in wanted]))
    for name, *three in zip(wanted, grads, *found, strict=True):
        assert_close_to_reference(*three, BF16, f"d {name}")


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_target_logit_holds_the_adapter_in_fp32(backend: str) -> None:
    """log p(target) near 0 from the adapter alone: bf16 tiles could not tell it from 0."""
    hidden, weight = torch.ones(1, 8, dtype=BF16), torch.zeros(100, 8, dtype=BF16)
    a, b = torch.zeros(2, 8, dtype=BF16), torch.zeros(100, 2, dtype=BF16)
    a[0, 0], b[3, 0] = 1, 18.5
    got = linear_logprob(
        hidden, weight, torch.tensor([3]), lora=LoraHead(a, b, 1.0), backend=backend
    )
    expected = -torch.log1p(99 * torch.exp(torch.tensor(-18.5, dtype=FP64)))
    torch.testing.assert_close(got.logprob.double()[0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraHead(torch.zeros(2, 5), torch.zeros(7, 2), 1.0), r"\[r, 4\].*\(2, 5\)"),
        (LoraHead(torch.zeros(2, 4), torch.zeros(7, 3), 1.0), "one rank"),
        (LoraHead(torch.zeros(0, 4), torch.zeros(7, 0), 1.0), "r > 0"),
        (LoraHead(torch.zeros(2, 4), torch.zeros(7, 2), float("nan")), "finite"),
        (LoraHead(torch.zeros(2, 4), torch.zeros(7, 2, device="meta"), 1.0), r"lora\.b is on meta"),
    ],
    ids=["width", "ranks", "empty", "scale", "device"],
)
@pytest.mark.parametrize("function", [linear_logprob, linear_cross_entropy])
def test_wrong_adapters_are_named(function: Any, lora: LoraHead, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, 1, 2]), lora=lora)


@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_the_yardstick_catches_a_missing_part(name: str) -> None:
    """Sabotage: an adapter scaled by 1 % is caught, in values and gradients."""
    data = problem(9, 16, 521, 4, FP32, "none")
    spoiled = data | {name: data[name] * 1.01}
    truth = call(reference.linear_logprob, leaves_of(data, FP64, ()), data["targets"])["logprob"]
    got = call(linear_logprob, leaves_of(spoiled, FP32, ()), data["targets"]).logprob
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(got, truth, truth.float(), FP32)
