"""`AdamW8bit` as a torch optimizer: groups, state dictionaries, DTensors, refusals."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost_kernels import AdamW8bit

BF16 = torch.bfloat16


def model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(80, 90), nn.ReLU(), nn.Linear(90, 70)).to(BF16)


def groups(net: nn.Module) -> list[dict[str, Any]]:
    params = list(net.parameters())
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-2, "weight_decay": 0.0}]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 80, generator=generator).to(BF16)
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values()]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_resumed_run_is_the_same_bit_for_bit() -> None:
    net = model()
    optimizer = AdamW8bit(groups(net), lr=1e-2, seed=77)
    train(net, optimizer, range(3))
    kept = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, kept)
    train(net, optimizer, range(3, 6))

    kept.seek(0)
    saved = torch.load(kept, weights_only=True)
    again = model()
    again.load_state_dict(saved["net"])
    resumed = AdamW8bit(groups(again), lr=9.0)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[1]["lr"] == 3e-2 and resumed.param_groups[0]["seed"] == 77
    train(again, resumed, range(3, 6))
    assert_same(list(net.parameters()), list(again.parameters()))
    assert_same(tensors(optimizer), tensors(resumed))


def test_a_loaded_state_is_a_copy() -> None:
    net = model()
    optimizer = AdamW8bit(net.parameters())
    train(net, optimizer, range(1))
    other = AdamW8bit(net.parameters())
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(tensors(optimizer))
    train(net, other, range(1))
    assert_same(before, tensors(optimizer))


def test_states_are_bytes_but_for_small_tensors() -> None:
    net = model()
    optimizer = AdamW8bit(net.parameters())
    train(net, optimizer, range(1))
    held = [
        {name: (x.dtype, x.numel()) for name, x in optimizer.state[p].items()}
        for p in net.parameters()
    ]
    assert held[0]["exp_avg"] == held[0]["exp_avg_sq"] == (torch.uint8, 7200)
    assert held[0]["absmax"] == held[0]["absmax_sq"] == (torch.float32, 29)
    assert held[1]["exp_avg"] == (torch.float32, 90) and held[1]["absmax"][1] == 0


def test_without_rounding_it_is_torchs_adamw_on_small_tensors() -> None:
    ours, theirs = (nn.Linear(8, 9) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}
    pair = (
        AdamW8bit(ours.parameters(), **options),
        torch.optim.AdamW(theirs.parameters(), **options),
    )
    for _ in range(5):
        x = torch.randn(4, 8)
        for net, optimizer in zip((ours, theirs), pair, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_are_scaled_on_the_way() -> None:
    nets = [model(), model()]
    for net, scale in zip(nets, (0.25, None), strict=True):
        optimizer = AdamW8bit(net.parameters())
        for p in net.parameters():
            p.grad = torch.ones_like(p) * (1.0 if scale else 0.25)
        optimizer.step(grad_scale=None if scale is None else torch.tensor(scale))
    assert_same(list(nets[0].parameters()), list(nets[1].parameters()))


def test_parameters_without_a_gradient_are_left_alone() -> None:
    net = model()
    optimizer = AdamW8bit(net.parameters())
    first, *others = net.parameters()
    before = first.detach().clone()
    for p in others:
        p.grad = torch.ones_like(p)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(first, before) and first not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="float32 and bfloat16"):
        AdamW8bit([nn.Parameter(torch.zeros(3, dtype=dtype))])


def test_refusals() -> None:
    param = nn.Parameter(torch.zeros(4, 6))
    for change in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            AdamW8bit([param], **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contiguous"):
        AdamW8bit([nn.Parameter(torch.zeros(4, 6).t())])
    optimizer = AdamW8bit([param])
    param.grad = torch.ones(4, 6).to_sparse()
    with pytest.raises(TypeError, match="SparseAdam"):
        optimizer.step()


def test_a_state_of_another_optimizer_is_refused() -> None:
    net = model()
    stock = torch.optim.AdamW(net.parameters())
    train(net, stock, range(1))
    with pytest.raises(ValueError, match="another optimizer"):
        AdamW8bit(net.parameters()).load_state_dict(stock.state_dict())


@pytest.fixture
def two_ranks() -> Iterator[Any]:
    """The first of two processes; the other one does not exist."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_shards_of_dtensors_step_as_their_local_tensors(two_ranks: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    weight, grad = torch.randn(101, 100).to(BF16), torch.randn(101, 100).to(BF16)
    for placement, rows in ((Shard(0), 51), (Replicate(), 101)):
        local, local_grad = weight[:rows].clone(), grad[:rows].clone()

        def wrap(tensor: Tensor, placement: Any = placement) -> DTensor:
            return DTensor.from_local(
                tensor, two_ranks, [placement], run_check=False, shape=weight.shape,
                stride=weight.stride(),
            )  # fmt: skip

        param = nn.Parameter(wrap(local.clone()))
        optimizer = AdamW8bit([param], seed=3)
        plain = nn.Parameter(local.clone())
        expected = AdamW8bit([plain], seed=3)
        for _ in range(2):
            param.grad, plain.grad = wrap(local_grad), local_grad
            optimizer.step()
            expected.step()
        state = optimizer.state[param]
        assert torch.equal(param.to_local(), plain)
        assert state["exp_avg"].shape == weight.shape
        assert state["exp_avg"].placements == (placement,)
        is_sharded = placement.is_shard()
        blocks = -(-rows * 100 // 256)
        assert state["absmax"].shape == (2 if is_sharded else 1, blocks)
        again = AdamW8bit([param])
        again.load_state_dict(optimizer.state_dict())
        for name, value in again.state[param].items():
            ours, theirs = value, state[name]
            if isinstance(ours, DTensor):
                ours, theirs = ours.to_local(), theirs.to_local()
            assert torch.equal(ours, theirs)


@pytest.fixture
def one_rank() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_distributed_checkpoint_of_fsdp2_goes_on_bit_for_bit(
    one_rank: Any, tmp_path: Any
) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    runs = []
    for _ in range(2):
        net = model()
        fully_shard(net, mesh=one_rank)
        runs.append((net, AdamW8bit(net.parameters(), lr=1e-2, seed=9)))
    (net, optimizer), (again, resumed) = runs
    train(net, optimizer, range(3))
    weights, states = get_state_dict(net, optimizer)
    checkpoint.save({"net": weights, "optimizer": states}, checkpoint_id=tmp_path)
    train(net, optimizer, range(3, 6))

    weights, states = get_state_dict(again, resumed)
    loaded = {"net": weights, "optimizer": states}
    checkpoint.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(
        again,
        resumed,
        model_state_dict=loaded["net"],
        optim_state_dict=loaded["optimizer"],
    )
    train(again, resumed, range(3, 6))
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())  # type: ignore[attr-defined]
        ours, theirs = optimizer.state[a], resumed.state[b]
        assert float(ours["step"]) == float(theirs["step"]) == 6
        for name in ("exp_avg", "exp_avg_sq", "absmax", "absmax_sq"):
            assert torch.equal(ours[name].full_tensor(), theirs[name].full_tensor()), name
