"""Two processes: DoRA on a 4-bit model sharded by FSDP2 has the gradients of one process."""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard

from fastpost import layers, load_nf4

IDS = torch.arange(3, 35).view(2, 16)


def make(folder: str, storage: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = load_nf4(folder, dtype=torch.float32, device="cpu", storage=storage)
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    peft = get_peft_model(model, config)
    layers.attach(peft)
    return peft


def gradients(model: Any) -> dict[str, Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def main(folder: str, storage: str) -> None:
    distributed.init_process_group("gloo")
    whole, sharded = (make(folder, getattr(torch, storage)) for _ in range(2))
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    packed = sharded.base_model.model.model.layers[0].mlp.up_proj.base_layer.packed
    assert packed.to_local().numel() * 2 == packed.numel()
    wanted, found = gradients(whole), gradients(sharded)
    assert wanted.keys() == found.keys() and len(wanted) == 14 * 3
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name].full_tensor(), gradient, msg=name)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
