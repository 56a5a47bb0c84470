"""One of two processes with a shard each: `python -m tests.ops.adamw_8bit_child FOLDER`.

Started by `test_adamw_8bit_sharded` with the variables torchrun would set. Steps six times with
gradients that are known on every process, goes through a distributed checkpoint after the third,
and leaves what it computed in FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpost_kernels import AdamW8bit

# Name -> shape; "uneven" has 51 and 50 rows, "small" has moments in float32.
SHAPES = {"even": (128, 64), "uneven": (101, 100), "small": (60, 20), "replicated": (70, 80)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "seed": 5}
STEPS, SAVED_AT = 6, 3


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in SHAPES.items()}


def gradient(name: str, step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator).to(dtype)


def train(params: dict[str, nn.Parameter], optimizer: Any, steps: range, wrap: Any) -> None:
    for step in steps:
        for name, param in params.items():
            param.grad = wrap(name, gradient(name, step, param.dtype))
        optimizer.step()


def run(dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def wrap(name: str, tensor: Tensor) -> DTensor:
        placement = Replicate() if name == "replicated" else Shard(0)
        return distribute_tensor(tensor, mesh, [placement])

    def fresh(scale: float = 1.0) -> tuple[nn.Module, dict[str, nn.Parameter], AdamW8bit]:
        params = {
            name: nn.Parameter(wrap(name, scale * weight))
            for name, weight in weights(dtype).items()
        }
        net = nn.Module()
        for name, param in params.items():
            net.register_parameter(name, param)
        return net, params, AdamW8bit(net.parameters(), **OPTIONS)

    net, params, optimizer = fresh()
    train(params, optimizer, range(SAVED_AT), wrap)
    own, states = get_state_dict(net, optimizer)
    checkpoint.save({"net": own, "optimizer": states}, checkpoint_id=folder)
    train(params, optimizer, range(SAVED_AT, STEPS), wrap)

    again, loaded_params, resumed = fresh(2.0)
    own, states = get_state_dict(again, resumed)
    loaded = {"net": own, "optimizer": states}
    checkpoint.load(loaded, checkpoint_id=folder)
    set_state_dict(
        again, resumed, model_state_dict=loaded["net"], optim_state_dict=loaded["optimizer"]
    )
    train(loaded_params, resumed, range(SAVED_AT, STEPS), wrap)

    def contents(params: dict[str, nn.Parameter], optimizer: AdamW8bit, of: Any) -> Any:
        return {
            name: {"weight": of(p)} | {key: of(x) for key, x in optimizer.state[p].items()}
            for name, p in params.items()
        }

    def local(x: Tensor) -> Tensor:
        return (x.to_local() if isinstance(x, DTensor) else x).detach().clone()

    def whole(x: Tensor) -> Tensor:
        return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()

    return {
        "whole": contents(params, optimizer, whole),
        "local": contents(params, optimizer, local),
        "resumed": contents(loaded_params, resumed, local),
    }


def main() -> None:
    dist.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    for name, dtype in DTYPES.items():
        torch.save(run(dtype, folder / f"checkpoint-{name}"), folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
