"""vocab_parallel_logprob in two and three processes against the reference of one, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost_kernels import reference
from fastpost_kernels.testing import assert_close_to_reference
from tests.ops.vocab_parallel_child import BF16, CASES, FAULTS, FP64, Case, problem
from tests.processes import run_processes

RANKS = 3
VALUES = ("logprob", "entropy", "log_sum_sq_probs", "mean_logits", "logsumexp")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What every rank got, by case: one start of three processes for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    run_processes("tests.ops.vocab_parallel_child", folder, count=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def of_one_process(
    case: Case, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Values and gradients of the reference in `dtype`."""
    data = problem(case)
    leaves = {
        name: None if data[name] is None else data[name].to(dtype).requires_grad_()
        for name in ("hidden", "weight", "bias")
    }
    values = reference.linear_logprob(targets=data["targets"], **leaves, **case.options)
    loss = sum((values[name] * seed.to(dtype)).sum() for name, seed in data["seeds"].items())
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return values, dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, ranks) -> None:
    case = CASES[name]
    found = [ranks[rank][name] for rank in range(case.size)]
    truth, true_grads = of_one_process(case, FP64)
    rough, rough_grads = of_one_process(case, case.dtype)
    if case.kind == "mixed":  # d hidden is rounded to the dtype of hidden, also on its way
        rough_grads["hidden"] = of_one_process(case, BF16)[1]["hidden"]
    values, grads = found[0]["values"], found[0]["grads"]
    for output in VALUES:
        if output == "logprob" or output in case.outputs:
            got = values[output]
            assert_close_to_reference(got, truth[output], rough[output], case.dtype, output)
        else:
            assert values[output] is None
    if "is_top1" in case.outputs and case.dtype != BF16:
        assert torch.equal(values["is_top1"], truth["is_top1"])
    wanted = {"hidden"}
    if case.trained:
        wanted |= {"weight", "bias"} if case.has_bias else {"weight"}
    assert grads.keys() == wanted
    # d hidden is the whole one on every rank, the head's gradients lie where their rows do
    whole = {
        key: grads[key] if key == "hidden" else torch.cat([one["grads"][key] for one in found])
        for key in grads
    }
    data = problem(case)
    for key, got in whole.items():
        assert got.dtype == data[key].dtype
        dtype = BF16 if case.kind == "mixed" and key == "hidden" else case.dtype
        assert_close_to_reference(got, true_grads[key], rough_grads[key], dtype, key)


@pytest.mark.parametrize("name", CASES)
def test_ranks_hold_the_same_bits(name: str, ranks) -> None:
    first, *others = (ranks[rank][name] for rank in range(CASES[name].size))
    for other in others:
        for output, value in first["values"].items():
            assert value is None or torch.equal(value, other["values"][output]), output
        assert torch.equal(first["grads"]["hidden"], other["grads"]["hidden"])


def test_ties_across_ranks_go_to_the_first_row_of_the_vocabulary(ranks) -> None:
    assert [rank["ties"] for rank in ranks] == [[True, False, False]] * RANKS


def test_nan_in_a_row_stays_in_that_row(ranks) -> None:
    assert all(row == [False, True, False, False] for rank in ranks for row in rank["nan"])


def errors(name: str, ranks: list[dict[str, Any]]) -> list[str]:
    return [rank["faults"][name] for rank in ranks]


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_on_one_rank_is_an_error_on_all(name: str, ranks) -> None:
    """The child also checks that the call after it is in step."""
    assert all("Error: " in error for error in errors(name, ranks)), errors(name, ranks)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("everywhere", r"targets[1] = -7 (2 such rows on rank 0"),
        ("bad-target-on-one", r"targets[1] = 9 (1 such rows on rank 1"),
        ("other-targets", "ranks 0 and 2 of the group differ in targets"),
        ("other-temperature", "ranks 0 and 1 of the group differ in softcap, temperature"),
        ("other-budget", "differ in memory_budget"),
        ("other-outputs", "differ in outputs"),
        ("other-rows", "differ in the rows of hidden, targets"),
        ("no-gradient", "differ in what needs gradients"),
        ("overlap", "[(0, 2), (1, 3), (4, 6)]: expected that they cover [0, 6)"),
        ("gap", "[(0, 2), (2, 4), (4, 5)]: expected that they cover [0, 6)"),
    ],
)
def test_what_only_the_group_can_see_is_told_to_all_alike(name: str, message: str, ranks) -> None:
    assert len(set(errors(name, ranks))) == 1
    assert message in errors(name, ranks)[0]


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        ("shape", 2, "ValueError: targets must be [M] = [3]"),
        ("dtype", 1, "TypeError: hidden must be one of"),
        ("transform", 0, "ValueError: temperature must be positive"),
        ("backend", 1, "ValueError: backend 'cpp' computes in float32"),
        ("padded", 2, "ValueError: weight_shard holds rows [4, 8) of a head of vocab_size 6"),
    ],
)
def test_a_refusal_names_the_rank_to_the_others(name: str, rank: int, message: str, ranks) -> None:
    for where, error in enumerate(errors(name, ranks)):
        expected = message if where == rank else f"ValueError: ranks [{rank}] of the group refused"
        assert error.startswith(expected)


def test_the_comparison_can_fail(ranks) -> None:
    """Sabotage: one rank's part of d hidden, or of the sums, missing is far outside the limits."""
    case = CASES["torch-float32-trained-three"]
    truth, true_grads = of_one_process(case, FP64)
    rough, rough_grads = of_one_process(case, case.dtype)
    found = ranks[0]["torch-float32-trained-three"]
    data = problem(case)
    logits = data["hidden"] @ data["weight"].T + data["bias"]
    rest = logits[:, : case.cuts[2]].logsumexp(-1)
    scored = data["targets"] != -100
    spoiled = found["values"]["logprob"] + torch.where(scored, logits.logsumexp(-1) - rest, 0)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(spoiled, truth["logprob"], rough["logprob"], case.dtype)
    spoiled = found["grads"]["hidden"] * (1 + 1e-4)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(spoiled, true_grads["hidden"], rough_grads["hidden"], case.dtype)
