"""preference_logratio against the float64 reference: values and all gradients, every backend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastpost import losses
from fastpost_kernels import HeadRows, PreferenceLogratio, preference_logratio, reference
from fastpost_kernels import _logprob_walks as walks
from fastpost_kernels._sequence_sums import Sequences
from fastpost_kernels._vocab_tiles import WeightTiles
from fastpost_kernels.testing import EPSILON, assert_close_to_reference

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
DIFFERENTIABLE = ("logps", "mean_logps", "logratios", "margins", "logprob")
VALUES = (*DIFFERENTIABLE, "ref_logps")
TRANSFORMED = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}
RAGGED = (5, 0, 7, 1, 3, 5)  # lengths of three chosen and three rejected sequences

Problem = dict[str, Any]


def problem(
    lengths: tuple[int, ...] = RAGGED,
    width: int = 24,
    vocab: int = 1009,
    dtype: torch.dtype = FP32,
    *,
    ref: str = "shared",  # "shared" head, "own" head, or "sums"
    masked: str = "some",  # or "none", "all"
    shared_rows: bool = False,
    weighted: bool = False,
) -> Problem:
    """Random arguments; with `shared_rows` there are fewer rows than places."""
    places = sum(lengths)

    def side(rows: int) -> dict[str, Tensor]:
        targets = torch.randint(0, vocab, (rows,))
        if masked != "none":
            targets[:: 1 if masked == "all" else 3] = -100
        return {"hidden": torch.randn(rows, width).to(dtype), "targets": targets}

    def rows_at_places(rows: int) -> Tensor | None:
        return torch.randint(0, max(rows, 1), (places,)) if shared_rows else None

    rows = places // 2 + 1 if shared_rows else places
    ref_rows = rows + 2 if shared_rows else places
    weight, bias = torch.randn(2, vocab, width).to(dtype), torch.randn(2, vocab).to(dtype)
    return {
        "policy": side(rows) | {"places": rows_at_places(rows)},
        "reference": side(ref_rows) | {"places": rows_at_places(ref_rows)},
        "weight": weight[0],
        "bias": bias[0],
        "ref_weight": weight[0] if ref == "shared" else weight[1],
        "ref_bias": bias[0] if ref == "shared" else bias[1],
        "ref": ref,
        "ref_sums": torch.randn(len(lengths)),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "token_weights": torch.rand(places) if weighted else None,
    }


def ours(data: Problem, leaves: dict[str, Tensor], **options: Any) -> PreferenceLogratio:
    """The op on `leaves` (hidden, weight, bias) in place of the problem's own tensors."""
    policy, ref = data["policy"], data["reference"]
    weight, bias = leaves["weight"], leaves["bias"]
    rows = HeadRows(leaves["hidden"], weight, policy["targets"], bias, policy["places"])
    other: HeadRows | Tensor = data["ref_sums"]
    if data["ref"] != "sums":
        if data["ref"] == "own":
            weight, bias = data["ref_weight"], data["ref_bias"]
        other = HeadRows(ref["hidden"], weight, ref["targets"], bias, ref["places"])
    return preference_logratio(
        rows, other, data["cu_seqlens"], token_weights=data["token_weights"], **options
    )


def expected(
    data: Problem, leaves: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """The reference in `dtype`; with "sums" the given ones take the place of its own."""
    policy, ref = data["policy"], data["reference"]
    ref_rows = [ref["hidden"], data["ref_weight"], ref["targets"], data["ref_bias"]]
    ref_logprob = reference.linear_logprob(
        *(x if x.dtype == torch.int64 else x.to(dtype) for x in ref_rows), **options
    )["logprob"]
    if ref["places"] is not None:
        ref_logprob = ref_logprob[ref["places"]]
    found = reference.preference_logratio(
        leaves["hidden"],
        leaves["weight"],
        policy["targets"],
        data["cu_seqlens"],
        ref_logprob,
        leaves["bias"],
        places=policy["places"],
        token_weights=data["token_weights"],
        **options,
    )
    if data["ref"] == "sums":
        found["ref_logps"] = data["ref_sums"].to(dtype)
        found["logratios"] = found["logps"] - found["ref_logps"]
        chosen, rejected = found["logratios"].tensor_split(2)
        found["margins"] = chosen - rejected
    return found


def leaves_of(data: Problem, dtype: torch.dtype, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    given = {"hidden": data["policy"]["hidden"], "weight": data["weight"], "bias": data["bias"]}
    return {
        name: x.detach().to(dtype, copy=True).requires_grad_(name in wanted)
        for name, x in given.items()
    }


def check(
    data: Problem,
    dtype: torch.dtype,
    *,
    backend: str,
    trained: bool,
    differentiated: tuple[str, ...] = DIFFERENTIABLE,
    memory_budget: int | None = None,
    **options: Any,
) -> None:
    """Values and gradients of one call against the reference."""
    wanted = ("hidden", "weight", "bias") if trained else ("hidden",)
    seeds: dict[str, Tensor] = {}

    def differentiate(values: dict[str, Any], leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        for name in differentiated:
            seeds.setdefault(name, torch.randn(values[name].shape))
        loss = sum((values[name] * seeds[name].to(values[name])).sum() for name in differentiated)
        return torch.autograd.grad(loss, [leaves[name] for name in wanted])

    leaves = leaves_of(data, dtype, wanted)
    got = ours(data, leaves, backend=backend, memory_budget=memory_budget, **options)._asdict()
    grads = differentiate(got, leaves)
    found = []
    for precision in (FP64, dtype):
        leaves = leaves_of(data, precision, wanted)
        values = expected(data, leaves, precision, **options)
        found.append((values, differentiate(values, leaves)))
    (truth, true_grads), (rough, rough_grads) = found
    assert got["num_tokens"].tolist() == truth["num_tokens"].tolist()
    for name in VALUES:
        assert_close_to_reference(got[name], truth[name], rough[name], dtype, name)
    for name, got_grad, true, baseline in zip(wanted, grads, true_grads, rough_grads, strict=True):
        assert got_grad.dtype == dtype
        assert_close_to_reference(got_grad, true, baseline, dtype, f"d {name}")


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("ref", ["shared", "own", "sums"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_matches_reference(backend: str, dtype: torch.dtype, ref: str, trained: bool) -> None:
    """Several row chunks and vocabulary tiles with ragged tails, an empty sequence among them."""
    data = problem(dtype=dtype, ref=ref, shared_rows=trained, weighted=not trained)
    options = TRANSFORMED if trained else {}
    check(data, dtype, backend=backend, trained=trained, memory_budget=9000, **options)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 9]), min_size=0, max_size=3),
    vocab=st.sampled_from([1, 7, 512, 513, 1009]),
    masked=st.sampled_from(["none", "some", "all"]),
    ref=st.sampled_from(["shared", "own", "sums"]),
    shared_rows=st.booleans(),
    weighted=st.booleans(),
    budget=st.sampled_from([1, 5000, None]),
    backend=st.sampled_from(["torch", "cpp", "triton"]),
    trained=st.booleans(),
)
def test_ragged_shapes(
    lengths: list[int],
    vocab: int,
    masked: str,
    ref: str,
    shared_rows: bool,
    weighted: bool,
    budget: int | None,
    backend: str,
    trained: bool,
) -> None:
    data = problem(
        (*lengths, *reversed(lengths)),
        7,
        vocab,
        ref=ref,
        masked=masked,
        shared_rows=shared_rows,
        weighted=weighted,
    )
    check(data, FP32, backend=backend, trained=trained, memory_budget=budget)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_result_alone_carries_gradients(name: str, trained: bool) -> None:
    check(problem(), FP32, backend="auto", trained=trained, differentiated=(name,))


def _pair_loss(name: str) -> Callable[[PreferenceLogratio], Tensor]:
    loss = getattr(losses, name)

    def of_sums(found: PreferenceLogratio) -> Tensor:
        return loss(*found.logps.chunk(2), *found.ref_logps.chunk(2), beta=0.3).loss.mean()

    def of_sums_and_lengths(found: PreferenceLogratio) -> Tensor:
        lengths = found.num_tokens.clamp(min=1).chunk(2)
        sums = (*found.logps.chunk(2), *found.ref_logps.chunk(2))
        return loss(*sums, *lengths, beta=0.3).loss.mean()

    return of_sums_and_lengths if name in ("ipo_loss", "dpo_norm_loss") else of_sums


LOSSES: dict[str, Callable[[PreferenceLogratio], Tensor]] = {
    name: _pair_loss(name)
    for name in (
        "dpo_loss",
        "dpo_norm_loss",
        "ipo_loss",
        "hinge_loss",
        "nca_pair_loss",
        "bco_pair_loss",
        "sppo_hard_loss",
        "aot_loss",
        "apo_zero_loss",
        "discopop_loss",
    )
} | {
    "from the margins": lambda found: -torch.nn.functional.logsigmoid(found.margins).mean(),
    "from means": lambda found: (
        -torch.nn.functional.logsigmoid(
            found.mean_logps.chunk(2)[0] - found.mean_logps.chunk(2)[1]
        ).mean()
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_any_loss_backpropagates_by_a_row_scaling(
    loss: Callable[[PreferenceLogratio], Tensor],
) -> None:
    """With a frozen head no GEMM runs in the backward, and the gradient is that of the logits."""
    data = problem(masked="none", lengths=(4, 2, 3, 5))
    leaves = leaves_of(data, FP32, ("hidden",))
    found = ours(data, leaves)
    with FlopCounterMode(display=False) as counter:
        loss(found).backward()
    assert counter.get_total_flops() == 0
    truth = leaves_of(data, FP64, ("hidden",))
    values = expected(data, truth, FP64)
    values["num_tokens"] = values["num_tokens"].long()
    loss(PreferenceLogratio(**values)).backward()
    got, true = leaves["hidden"].grad, truth["hidden"].grad
    assert got is not None and true is not None and true.abs().max() > 0
    # a tensor of the gradient's own scale: losses of squares amplify the rounding of sums near 50
    torch.testing.assert_close(got.double(), true, rtol=0, atol=1e-5 * float(true.abs().max()))


def test_sums_are_those_of_the_log_probs() -> None:
    """Whatever the dtype of the rows, sums are exact to the result's rounding."""
    data = problem(dtype=BF16, masked="some", shared_rows=True)
    found = ours(data, leaves_of(data, BF16, ()))
    values = found.logprob.double()[data["policy"]["places"]]
    parts = values.tensor_split(data["cu_seqlens"].tolist()[1:-1])
    sums = torch.stack([part.sum() for part in parts])
    assert torch.equal(found.logps, sums.float())
    assert torch.equal(found.logratios, found.logps - found.ref_logps)
    chosen, rejected = found.logratios.chunk(2)
    assert torch.equal(found.margins, chosen - rejected)


def test_long_sequences_keep_their_digits() -> None:
    """A running fp32 sum of 200,000 numbers would be off by 1e-4."""
    values = torch.rand(200_000)
    sequences = Sequences(torch.tensor([0, 199_999, 200_000]), None, None, 200_000)
    sums = torch.stack([values[:199_999].double().sum(), values[199_999].double()])
    assert torch.equal(sequences.sums(values), sums.float())


def test_shared_rows_are_as_good_as_copies() -> None:
    """Two sequences that hold the same row, against rows that were copied before."""
    data = problem(shared_rows=True, masked="some")
    copied = dict(data)
    for side in ("policy", "reference"):
        rows, places = data[side], data[side]["places"]
        copied[side] = {
            "hidden": rows["hidden"][places],
            "targets": rows["targets"][places],
            "places": None,
        }
    one, two = leaves_of(data, FP32, ("hidden",)), leaves_of(copied, FP32, ("hidden",))
    found, again = ours(data, one), ours(copied, two)
    for name in ("logps", "ref_logps", "num_tokens"):
        torch.testing.assert_close(getattr(found, name), getattr(again, name))
    found.margins.sum().backward()
    again.margins.sum().backward()
    grad, scattered = one["hidden"].grad, two["hidden"].grad
    assert grad is not None and scattered is not None
    summed = torch.zeros_like(grad).index_add(0, data["policy"]["places"], scattered)
    torch.testing.assert_close(grad, summed)


def test_one_head_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and reference on one head take each of its tiles, and cast it, once."""
    taken: list[int] = []
    original = WeightTiles.slice

    def counting(self: WeightTiles, first: int, last: int) -> Tensor:
        taken.append(first)
        return original(self, first, last)

    monkeypatch.setattr(WeightTiles, "slice", counting)
    data = problem(masked="none", vocab=9000)  # 3 tiles of at most 4096 columns
    together = ours(data, leaves_of(data, FP32, ()))
    assert taken == [0, 4096, 8192]
    # equal values in other tensors: one walk after the other
    data |= {"ref": "own", "ref_weight": data["weight"].clone(), "ref_bias": data["bias"].clone()}
    apart = ours(data, leaves_of(data, FP32, ()))
    assert taken == 3 * [0, 4096, 8192]
    torch.testing.assert_close(together.margins, apart.margins)


def test_no_gradient_reaches_the_reference() -> None:
    data = problem(ref="own")
    leaves = leaves_of(data, FP32, ("hidden", "weight"))
    others = [
        x.requires_grad_()
        for x in (data["reference"]["hidden"], data["ref_weight"], data["ref_bias"])
    ]
    found = ours(data, leaves)
    assert not found.ref_logps.requires_grad
    found.margins.sum().backward()
    assert leaves["hidden"].grad is not None and leaves["weight"].grad is not None
    assert all(x.grad is None for x in others)


def test_statistics_of_the_policy_come_on_request() -> None:
    data = problem()
    leaves = leaves_of(data, FP32, ("hidden",))
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    found = ours(data, leaves, outputs=names)
    truth = reference.linear_logprob(
        leaves["hidden"].double(),
        leaves["weight"].double(),
        data["policy"]["targets"],
        leaves["bias"].double(),
    )
    for name in names:
        got = getattr(found, name)
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), truth[name].double(), rtol=1e-5, atol=1e-5)
    assert ours(data, leaves).entropy is None


def test_a_bad_row_spoils_its_own_pair_only() -> None:
    data = problem(masked="none", lengths=(3, 4, 2, 5))
    data["policy"]["hidden"][4] = float("nan")  # in the second chosen sequence
    found = ours(data, leaves_of(data, FP32, ()))
    assert found.logps.isnan().tolist() == [False, True, False, False]
    assert found.margins.isnan().tolist() == [False, True]


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values or gradients off by four times what rounding may cost are noticed."""
    data = problem()
    factor = 1 + 4 * EPSILON[FP32] + 1e-5
    sums, spread = Sequences.sums, Sequences.spread
    for name, wrong in (
        ("sums", lambda self, values: sums(self, values) * factor),
        ("spread", lambda self, grads: spread(self, grads) * factor),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(Sequences, name, wrong)
            with pytest.raises(AssertionError):
                check(data, FP32, backend="torch", trained=False)
    with monkeypatch.context() as patched:  # the reference's rows taken for the policy's
        pair = walks.forward_pair
        patched.setattr(
            sys.modules["fastpost_kernels.preference_logratio"],
            "forward_pair",
            lambda policy, ref, *rest: pair(ref, ref, *rest),
        )
        with pytest.raises(AssertionError):
            check(data, FP32, backend="torch", trained=False)
    check(data, FP32, backend="torch", trained=False)


def test_second_backward_gives_the_same() -> None:
    data = problem(shared_rows=True)
    leaves = leaves_of(data, FP32, ("hidden",))
    loss = ours(data, leaves).margins.sum()
    (first,) = torch.autograd.grad(loss, [leaves["hidden"]], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [leaves["hidden"]])
    assert torch.equal(first, second)


def _broken(**changes: Any) -> Callable[[], PreferenceLogratio]:
    def call() -> PreferenceLogratio:
        rows = HeadRows(torch.randn(6, 4), torch.randn(9, 4), torch.zeros(6, dtype=torch.int64))
        policy = rows._replace(**changes.get("policy", {}))
        given = {"reference": rows, "cu_seqlens": torch.tensor([0, 2, 6])} | changes
        given.pop("policy", None)
        return preference_logratio(policy, given.pop("reference"), given.pop("cu_seqlens"), **given)

    return call


ROWS = HeadRows(torch.randn(5, 4), torch.randn(9, 4), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (_broken(cu_seqlens=torch.tensor([0, 6])), ValueError, "even number"),
        (_broken(cu_seqlens=torch.tensor([0, 2, 5])), ValueError, "rise from 0"),
        (_broken(cu_seqlens=torch.tensor([1, 2, 6])), ValueError, "rise from 0"),
        (_broken(cu_seqlens=torch.tensor([0, 7, 6])), ValueError, "rise from 0"),
        (_broken(cu_seqlens=torch.tensor([0.0, 2, 6])), TypeError, "int32 or int64"),
        (_broken(policy={"places": torch.tensor([0, 1, 2, 3, 4, 6])}), ValueError, "must be rows"),
        (_broken(policy={"places": torch.zeros(6)}), TypeError, "int32 or int64"),
        (_broken(policy={"places": torch.zeros(6, 1).long()}), ValueError, r"must be \[N\]"),
        (_broken(policy={"targets": torch.full((6,), 9)}), ValueError, "vocabulary"),
        (_broken(policy={"targets": torch.zeros(5).long()}), ValueError, r"targets must be \[M\]"),
        (_broken(reference=ROWS), ValueError, "the same places"),
        (_broken(reference=torch.zeros(3)), ValueError, "given as sums"),
        (_broken(token_weights=torch.ones(5)), ValueError, "one per place"),
        (_broken(outputs=("logits",)), ValueError, "outputs must be"),
        (_broken(temperature=0.0), ValueError, "positive"),
        (_broken(backend="cuda"), ValueError, "backend must be"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
