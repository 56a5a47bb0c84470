"""Heads spread over processes against one process: DTensors by hand, transformers' own plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from fastpost.parallel_head import parallel_linear_cross_entropy, parallel_linear_logprob
from fastpost_kernels import linear_cross_entropy, linear_logprob
from tests.parallel_head_child import (
    GRID,
    LAYOUTS,
    MODELS,
    OUTPUTS,
    head,
    rows_of,
    run_adapter,
    save_models,
    score,
    token_ids,
)
from tests.processes import run_processes

TWO = [*LAYOUTS, *(name for name in MODELS if "fsdp-tp" not in name), "refusals", "adapter"]
FOUR = [*GRID, *(name for name in MODELS if "fsdp-tp" in name)]
Ranks = list[dict[str, Any]]


def start(folder: Path, size: int, cases: list[str]) -> Ranks:
    """Run the cases in `size` processes over gloo, one start for all of them."""
    save_models(folder)
    run_processes("tests.parallel_head_child", folder, cases, size)
    return [torch.load(folder / f"rank{rank}-of-{size}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("head")


@pytest.fixture(scope="module")
def two(folder) -> Ranks:
    return start(folder, 2, TWO)


@pytest.fixture(scope="module")
def four(folder) -> Ranks:
    return start(folder, 4, FOUR)


def alone(batch: int, kind: str) -> dict[str, Any]:
    """One process with the whole head and the rows of one data-parallel rank."""
    weight, bias = (x.requires_grad_() for x in head())
    return score(rows_of(batch), weight, bias, kind) | {"weight": weight.grad, "bias": bias.grad}


def assert_layout(case: str, ranks: Ranks) -> None:
    batches = sorted({rank[case]["batch"] for rank in ranks})
    for kind in ("logprob", "loss"):
        expected = {batch: alone(batch, kind) for batch in batches}
        # what every rank's gradient of the head is: the mean over the rows of all
        means = {
            name: torch.stack([expected[batch][name] for batch in batches]).mean(0)
            for name in ("weight", "bias")
        }
        for rank in ranks:
            for trained in (True, False):
                got = rank[case][f"{kind}-{trained}"]
                wanted = expected[rank[case]["batch"]]
                assert torch.equal(got["is_top1"], wanted["is_top1"])
                for name in ("logprob", "entropy", "loss", "hidden"):
                    torch.testing.assert_close(got[name], wanted[name], rtol=2e-5, atol=2e-6)
            for name in ("weight", "bias"):
                got = rank[case][f"{kind}-True"][name]
                torch.testing.assert_close(got, means[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_spread_head_is_the_whole_head(case: str, two) -> None:
    assert_layout(case, two)


def test_an_adapter_on_a_spread_head(two) -> None:
    expected = run_adapter(head()[0])
    for rank in two:
        for name, value in expected.items():
            torch.testing.assert_close(rank["adapter"][name], value, rtol=2e-5, atol=2e-6)


def test_the_cases_tell_data_from_tensor_parallel(two) -> None:
    """Data-parallel ranks hold different rows, so averaging is not adding or keeping one's own."""
    assert [rank["fsdp"]["batch"] for rank in two] == [0, 1]
    assert [rank["tp-vocabulary"]["batch"] for rank in two] == [0, 0]
    first, second = alone(0, "logprob"), alone(1, "logprob")
    assert (first["weight"] - second["weight"]).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID)
def test_a_head_spread_two_ways(case: str, four) -> None:
    assert_layout(case, four)


def gradients_alone(folder: Path, tied: bool, batches: list[int]) -> dict[str, Tensor]:
    """Mean over batches of the stock model's loss and gradients, by its own logits."""
    model = LlamaForCausalLM.from_pretrained(folder / f"llama-{tied}")
    for batch in batches:
        ids = token_ids(batch)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        (loss / len(batches)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_model(case: str, ranks: Ranks, folder: Path) -> None:
    tied, sizes = MODELS[case]
    # FSDP2 hands its gathered head to the kernel, tensor parallelism leaves it spread
    assert all(rank[case]["spread"] == ("tp_size" in sizes) for rank in ranks)
    batches = sorted({rank[case]["batch"] for rank in ranks})
    assert len(batches) == sizes.get("fsdp_size", 1)
    expected = gradients_alone(folder, tied, batches)
    for rank in ranks:
        assert rank[case]["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            error = (rank[case]["gradients"][name] - gradient).norm()
            assert error <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("case", [name for name in MODELS if name in TWO])
def test_transformers_own_plans(case: str, two, folder) -> None:
    """Every gradient of the model, through the spread head, equals the stock model's."""
    assert_model(case, two, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in MODELS if name in FOUR])
def test_transformers_own_plans_combined(case: str, four, folder) -> None:
    assert_model(case, four, folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain bias", "ValueError: the weight's vocabulary is spread over"),
        ("hidden", "TypeError: hidden is a DTensor"),
        ("partial", "ValueError: a head's weight and bias must be sharded or replicated"),
    ],
)
def test_what_has_no_meaning_is_refused(name: str, message: str, two) -> None:
    assert all(rank["refusals"][name].startswith(message) for rank in two)


def test_a_plain_head_is_the_plain_kernel() -> None:
    rows, (weight, bias) = rows_of(0), head()
    arguments = (rows["hidden"], weight, rows["targets"], bias)
    ours, theirs = (
        f(*arguments, outputs=OUTPUTS) for f in (parallel_linear_logprob, linear_logprob)
    )
    assert all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for options in ({}, {"num_items": 5}):
        one = parallel_linear_cross_entropy(*arguments, **options).loss
        assert torch.equal(one, linear_cross_entropy(*arguments, **options).loss)
