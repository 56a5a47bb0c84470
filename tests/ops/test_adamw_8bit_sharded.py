"""`AdamW8bit` in two processes over gloo, a shard each: equal to one process that holds it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost_kernels import AdamW8bit, adamw_8bit_, adamw_state
from tests.ops.adamw_8bit_child import DTYPES, OPTIONS, SHAPES, STEPS, gradient, train, weights
from tests.processes import run_processes

NAMES = list(SHAPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they computed."""
    folder = tmp_path_factory.mktemp("shards")
    run_processes("tests.ops.adamw_8bit_child", folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each process left, by dtype."""
    return [
        {name: torch.load(folder / f"{name}-{rank}.pt") for name in DTYPES} for rank in range(2)
    ]


def alone(dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], AdamW8bit]:
    params = {name: nn.Parameter(weight) for name, weight in weights(dtype).items()}
    optimizer = AdamW8bit(params.values(), **OPTIONS)
    train(params, optimizer, range(STEPS), lambda name, tensor: tensor)
    return params, optimizer


def rows(name: str, rank: int, tensor: Tensor) -> Tensor:
    """A process's part, as torch.chunk cuts it."""
    return tensor if name == "replicated" else tensor.chunk(2)[rank]


def test_fp32_weights_and_states_are_those_of_one_process(ranks: Any) -> None:
    """Bit for bit where a block of 256 does not straddle two shards."""
    params, optimizer = alone(torch.float32)
    for rank in range(2):
        found = ranks[rank]["float32"]["whole"]
        for name in ("even", "small", "replicated"):
            assert torch.equal(found[name]["weight"], params[name]), name
            for key, value in optimizer.state[params[name]].items():
                assert torch.equal(found[name][key].flatten(), value.flatten()), (name, key)
        # Blocks of the second shard begin elsewhere: the same but for 8 bits.
        error = (found["uneven"]["weight"] - params["uneven"]).abs().max()
        assert 0 < error < 0.1 * OPTIONS["lr"] * STEPS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_shard_is_stepped_as_the_tensor_it_is(name: str, dtype: str, ranks: Any) -> None:
    """Bit for bit, bf16 rounded at random included: random words follow from place and shard."""
    for rank in range(2):
        weight = rows(name, rank, weights(DTYPES[dtype])[name]).clone()
        is_8bit = name != "small"
        state = adamw_state(weight, is_8bit=is_8bit)
        shard = 0 if name == "replicated" else rank
        for step in range(STEPS):
            adamw_8bit_(
                [weight],
                [rows(name, rank, gradient(name, step, DTYPES[dtype])).contiguous()],
                [state],
                lr=OPTIONS["lr"],
                weight_decay=OPTIONS["weight_decay"],
                steps=[step + 1],
                seed=OPTIONS["seed"],
                streams=[NAMES.index(name) | shard << 32],
            )
        found = ranks[rank][dtype]["local"][name]
        assert torch.equal(found["weight"], weight)
        for key, value in state._asdict().items():
            assert torch.equal(found[key].flatten()[: value.numel()], value.flatten()), key
        assert found["exp_avg"].dtype == (torch.uint8 if is_8bit else torch.float32)


def test_replicas_stay_equal(ranks: Any) -> None:
    first, second = (rank["bfloat16"]["local"] for rank in ranks)
    for key, value in first["replicated"].items():
        assert torch.equal(value, second["replicated"][key]), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_distributed_checkpoint_goes_on_bit_for_bit(dtype: str, ranks: Any) -> None:
    for rank in ranks:
        for name, expected in rank[dtype]["local"].items():
            for key, value in expected.items():
                found = rank[dtype]["resumed"][name][key]
                assert found.dtype == value.dtype and torch.equal(found, value), (name, key)


def test_another_number_of_processes_is_refused(folder: Path) -> None:
    """Blocks are cut from shards: the states of two are not those of one."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    net = nn.Module()
    for name, weight in weights(torch.float32).items():
        net.register_parameter(name, nn.Parameter(weight))
    optimizer = AdamW8bit(net.parameters(), **OPTIONS)
    own, states = get_state_dict(net, optimizer)
    with pytest.raises(checkpoint.CheckpointException) as error:
        checkpoint.load(
            {"net": own, "optimizer": states},
            checkpoint_id=folder / "checkpoint-float32",
            no_dist=True,
        )
    reason, _ = error.value.failures[0]
    assert "Size mismatch" in str(reason) and "absmax" in str(reason)
