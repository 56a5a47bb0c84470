"""Two processes with half the batch each compute what one process computes with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_processes
from tests.trainers import footprint
from tests.trainers.distributed_child import CASES, run_case
from tests.trainers.methods import METHODS

FAST = ["SFT", "DPO", "GRPO"]
SLOW = [case for case in CASES if case not in FAST]
# Not compared with one process.
OTHERS = ("SFT-tokens-per-device", "GRPO-fsdp-bf16", "DPO-fsdp-lora-half")
# Its metrics are means over the tokens of a process, averaged over processes.
MEANS_PER_PROCESS = {"PPO"}


def start(folder: Path, cases: list[str]) -> None:
    """Run the cases in two processes over gloo, one start for all of them."""
    for name in {CASES[case][0] for case in cases}:
        model = METHODS[name].model()
        model.save_pretrained(folder / name)
        model.config.tie_word_embeddings = False
        type(model)(model.config).save_pretrained(folder / f"{name}-untied")
    run_processes("tests.trainers.distributed_child", folder, cases)


@pytest.fixture(scope="module")
def fast_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    start(folder, FAST)
    return folder


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    start(folder, SLOW)
    return folder


def results(case: str, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    ranks = [torch.load(folder / f"{case}-rank{rank}.pt") for rank in range(2)]
    return ranks, run_case(case, folder, 1)


def assert_same(case: str, folder: Path) -> None:
    (first, second), alone = results(case, folder)
    assert not footprint.differing(first["weights"], second["weights"])
    assert alone["loss"] and any(g.norm() > 0 for g in alone["gradients"].values())
    torch.testing.assert_close(
        torch.tensor(first["loss"]), torch.tensor(alone["loss"]), atol=1e-5, rtol=0
    )
    assert first["gradients"].keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        error = (first["gradients"][name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-6, name
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-5, rtol=0)
    for ours, expected in zip(first["metrics"], alone["metrics"], strict=True):
        assert ours.keys() == expected.keys()
        names = {"loss"} & ours.keys() if case in MEANS_PER_PROCESS else ours.keys()
        for name in names:
            assert ours[name] == pytest.approx(expected[name], abs=1e-4, rel=1e-4), name


@pytest.mark.parametrize("case", FAST)
def test_two_processes_equal_one(case, fast_folder) -> None:
    assert_same(case, fast_folder)


@pytest.mark.slow
def test_bf16_rounds_neither_log_probs_nor_sums_of_gradients(slow_folder) -> None:
    """accelerate's own policy for FSDP2 rounds both, which moves a DPO loss in its third digit."""
    found = torch.load(slow_folder / "GRPO-fsdp-bf16-rank0.pt")
    assert found["returned"] and found["gradients"]
    for values in (*found["returned"], *found["gradients"].values()):
        assert values.dtype == torch.float32
        assert not values.any() or (values != values.bfloat16()).any()


@pytest.mark.slow
def test_adapters_in_fp32_train_beside_weights_in_bf16(slow_folder) -> None:
    found = torch.load(slow_folder / "DPO-fsdp-lora-half-rank0.pt")
    assert found["gradients"] and all("lora_" in name for name in found["gradients"])
    assert all(g.dtype == torch.float32 and g.any() for g in found["gradients"].values())


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in SLOW if case not in OTHERS])
def test_two_processes_equal_one_for_all(case, slow_folder) -> None:
    assert_same(case, slow_folder)


@pytest.mark.slow
def test_means_per_device_are_another_loss(slow_folder) -> None:
    """`average_tokens_across_devices=False` is honoured, and the comparison can fail."""
    with pytest.raises(AssertionError):
        assert_same("SFT-tokens-per-device", slow_folder)


@pytest.mark.slow
def test_every_method_runs_in_two_processes() -> None:
    assert {name for name, *_ in CASES.values()} == METHODS.keys()
