"""One of two processes that shard: `python -m tests.trainers.memory_child FOLDER`.

Started by `test_memory_distributed` with the variables torchrun would set. Trains the same rows
under FSDP2 by every case and leaves weights, states and the gradients alive in FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from fastpost.optimizer_in_backward import layer_of
from tests.trainers import methods
from tests.trainers.conftest import whole
from tests.trainers.distributed_child import shard_on_cpus
from tests.trainers.methods import METHODS

# Case -> config fields.
CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "in backward": {
        "optimizer_in_backward": True,
        "activation_checkpointing": True,
    },
    "everything": {
        "optimizer_in_backward": True,
        "mlp_tile_tokens": 24,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False, "offload": True},
    },
}
GLOBAL_BATCH = 4


class Shards(TrainerCallback):
    """Elements of gradients alive on this process, whenever one is added, and of its layers."""

    def __init__(self) -> None:
        self.most = 0
        self.layers: dict[str, int] = {}
        self.are_shards = True

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for name, parameter in named:
            layer = layer_of(name) if "layers." in name else "root"
            self.layers[layer] = self.layers.get(layer, 0) + local(parameter).numel()
            parameter.register_post_accumulate_grad_hook(lambda p: self.count(p, named))

    def count(self, parameter: torch.Tensor, named: Any) -> None:
        self.are_shards &= not dist.is_initialized() or isinstance(parameter.grad, DTensor)
        alive = sum(local(p.grad).numel() for _, p in named if p.grad is not None)
        self.most = max(self.most, alive)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def run_case(case: str, folder: Path, num_processes: int) -> dict[str, Any]:
    """Three steps of AdamW with 8-bit states."""
    method = METHODS["SFT"]
    settings = methods.settings_of(
        method,
        folder / f"{case}-{num_processes}",
        per_device_train_batch_size=GLOBAL_BATCH // num_processes,
        max_steps=3,
        learning_rate=1e-2,
        optimizer="adamw_8bit",
        **({"ddp_backend": "gloo", "fsdp": True} if num_processes > 1 else {}),
        **CASES[case],
    )
    trainer = methods.build_trainer(method, settings, method.model())
    shards = Shards()
    trainer.add_callback(shards)
    trainer.train()
    if num_processes > 1:
        layers = next(m for n, m in trainer.model.named_modules() if n.endswith(".layers"))
        assert all(isinstance(layer, FSDPModule) for layer in layers)
    optimizer = trainer.optimizer.optimizer
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    found = {
        "loss": trainer.trace.losses,
        "norms": [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log],
        "weights": trainer.trace.weights,
        "states": [{k: whole(v) for k, v in optimizer.state[p].items()} for p in trained],
        "most": shards.most,
        "layers": shards.layers,
        "are_shards": shards.are_shards,
    }
    trainer.engine.remove()
    return found


def main() -> None:
    shard_on_cpus()
    folder = Path(sys.argv[1])
    for case in CASES:
        result = run_case(case, folder, int(os.environ["WORLD_SIZE"]))
        torch.save(result, folder / f"{case}-{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
