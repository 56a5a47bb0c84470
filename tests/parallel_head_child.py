"""One process around a spread head: `python -m tests.parallel_head_child FOLDER CASE...`

Started by `test_parallel_head` with the variables torchrun would set. Leaves what this rank got in
FOLDER. Models are transformers' own, spread by `from_pretrained(distributed_config=...)`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from fastpost.parallel_head import parallel_linear_cross_entropy, parallel_linear_logprob
from fastpost.scoring import accelerate_model
from fastpost_kernels import LoraHead

VOCAB, WIDTH, ROWS = 257, 32, 11  # odd: the parts of the vocabulary are uneven
OUTPUTS = ("entropy", "is_top1")
# Name -> mesh dimensions and sizes, how weight and bias lie on it.
LAYOUTS: dict[str, tuple[dict[str, int], list[Placement], list[Placement]]] = {
    "tp-vocabulary": ({"tp": 2}, [Shard(0)], [Shard(0)]),
    "tp-vocabulary-whole-bias": ({"tp": 2}, [Shard(0)], [Replicate()]),
    "tp-width": ({"tp": 2}, [Shard(1)], [Replicate()]),
    "tp-replicated": ({"tp": 2}, [Replicate()], [Replicate()]),
    "another-name": ({"model": 2}, [Shard(0)], [Shard(0)]),
    "fsdp": ({"fsdp": 2}, [Shard(0)], [Shard(0)]),
    "fsdp-width": ({"fsdp": 2}, [Shard(1)], [Shard(0)]),
    "dp-replicated": ({"dp_replicate": 2}, [Replicate()], [Replicate()]),
}
GRID = {"dp_replicate-fsdp": ("dp_replicate", "fsdp"), "fsdp-tp": ("fsdp", "tp")}
# Name -> tied embeddings, sizes of the DistributedConfig.
MODELS = {
    "model-tp": (False, {"tp_size": 2}),
    "model-tp-tied": (True, {"tp_size": 2}),
    "engine-tp": (False, {"tp_size": 2}),
    "engine-fsdp": (False, {"fsdp_size": 2}),
    "model-fsdp": (False, {"fsdp_size": 2}),
    "model-fsdp-tied": (True, {"fsdp_size": 2}),
    "model-fsdp-tp": (False, {"fsdp_size": 2, "tp_size": 2}),
    "model-fsdp-tp-tied": (True, {"fsdp_size": 2, "tp_size": 2}),
}


def save_models(folder: Path) -> None:
    for tied in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        LlamaForCausalLM(config).save_pretrained(folder / f"llama-{tied}")


def rows_of(batch: int) -> dict[str, Tensor]:
    """Hidden rows, targets and the loss's coefficients of one data-parallel rank."""
    random = torch.Generator().manual_seed(batch)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=random)
    targets[3] = -100
    hidden = torch.randn(ROWS, WIDTH, generator=random)
    return {"hidden": hidden, "targets": targets, "seeds": torch.randn(ROWS, generator=random)}


def head() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(99)
    weight = torch.randn(VOCAB, WIDTH, generator=random)
    return weight, torch.randn(VOCAB, generator=random)


def score(rows: dict[str, Tensor], weight: Tensor, bias: Tensor, kind: str) -> dict[str, Any]:
    """What `kind` of call gives: values, loss and the gradient of hidden; fills `.grad`."""
    hidden = rows["hidden"].clone().requires_grad_()
    if kind == "logprob":
        found = parallel_linear_logprob(hidden, weight, rows["targets"], bias, outputs=OUTPUTS)
        loss = (found.logprob * rows["seeds"]).sum() + 0.1 * found.entropy.sum()
    else:
        found = parallel_linear_cross_entropy(
            hidden, weight, rows["targets"], bias, num_items=7, outputs=OUTPUTS
        )
        loss = found.loss
    loss.backward()
    values = {name: getattr(found, name).detach() for name in ("logprob", *OUTPUTS)}
    return values | {"loss": loss.detach(), "hidden": hidden.grad}


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def data_rank(mesh: Any) -> int:
    """Which rows this process computes: equal along "tp", its own along every other dimension."""
    batch = 0
    for dim, name in enumerate(mesh.mesh_dim_names):
        if name not in ("tp", "model"):
            batch = batch * mesh.size(dim) + mesh.get_local_rank(dim)
    return batch


def run_layout(
    mesh: Any, placements: list[Placement], bias_placements: list[Placement]
) -> dict[str, Any]:
    rows = rows_of(data_rank(mesh))
    result: dict[str, Any] = {"batch": data_rank(mesh)}
    for trained in (True, False):
        for kind in ("logprob", "loss"):
            weight, bias = head()
            weight = distribute_tensor(weight, mesh, placements).requires_grad_(trained)
            bias = distribute_tensor(bias, mesh, bias_placements).requires_grad_(trained)
            found = score(rows, weight, bias, kind)
            for name, leaf in (("weight", weight), ("bias", bias)):
                assert (leaf.grad is None) != trained
                if leaf.grad is not None:
                    assert leaf.grad.placements == leaf.placements
                found[name] = whole(leaf.grad)
            result[f"{kind}-{trained}"] = found
    return result


def install_scorer(model: LlamaForCausalLM, seen: dict[str, Any]) -> None:
    """A forward that scores its own inputs, as an installed engine does."""

    def forward(input_ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        weight = model.lm_head.weight
        seen["spread"] = isinstance(weight, DTensor)
        found = parallel_linear_logprob(
            hidden[:, :-1].flatten(0, 1), weight, input_ids[:, 1:].flatten()
        )
        return -found.logprob.mean()

    model.forward = forward


def token_ids(batch: int) -> Tensor:
    return (torch.arange(5, 21)[None] * (3 + 2 * batch)) % VOCAB


def run_model(folder: Path, name: str) -> dict[str, Any]:
    tied, sizes = MODELS[name]
    path = folder / f"llama-{tied}"
    model = LlamaForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**sizes))
    batch = dist.get_rank() // sizes.get("tp_size", 1)
    seen: dict[str, Any] = {}
    ids = token_ids(batch)
    if name.startswith("engine"):
        accelerate_model(model)
        # of FSDP2's the engine gets what was gathered behind the backbone
        seen["spread"] = "tp_size" in sizes and isinstance(model.lm_head.weight, DTensor)
        mask = torch.ones_like(ids)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).loss
    else:
        install_scorer(model, seen)
        loss = model(input_ids=ids)
    loss.backward()
    gradients = {key: whole(parameter.grad) for key, parameter in model.named_parameters()}
    return {"batch": batch, "gradients": gradients, **seen}


def run_adapter(weight: Tensor) -> dict[str, Tensor]:
    """Gradients of hidden and of a LoRA adapter on a frozen head."""
    random = torch.Generator().manual_seed(7)
    rows = rows_of(0)
    a, b = torch.randn(4, WIDTH, generator=random), torch.randn(VOCAB, 4, generator=random)
    leaves = [x.requires_grad_() for x in (rows["hidden"], a, b)]
    found = parallel_linear_logprob(leaves[0], weight, rows["targets"], lora=LoraHead(a, b, 0.5))
    loss = parallel_linear_cross_entropy(
        leaves[0], weight, rows["targets"], lora=LoraHead(a, b, 0.5)
    ).loss
    grads = torch.autograd.grad((found.logprob * rows["seeds"]).sum() + loss, leaves)
    return {"logprob": found.logprob.detach()} | dict(zip("hab", grads, strict=True))


def refusals() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    rows, (weight, bias) = rows_of(0), head()
    spread = distribute_tensor(weight, mesh, [Shard(0)])
    hidden = DTensor.from_local(rows["hidden"], mesh, [Replicate()])
    partial = DTensor.from_local(weight, mesh, [Partial()])
    calls = {
        "plain bias": (rows["hidden"], spread, bias),
        "hidden": (hidden, spread, None),
        "partial": (rows["hidden"], partial, None),
    }
    seen = {}
    for name, (given, head_weight, head_bias) in calls.items():
        try:
            parallel_linear_logprob(given, head_weight, rows["targets"], head_bias)
        except (TypeError, ValueError) as error:
            seen[name] = f"{type(error).__name__}: {error}"
    return seen


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for case in cases:
        if case in MODELS:
            found[case] = run_model(folder, case)
        elif case == "refusals":
            found[case] = refusals()
        elif case == "adapter":
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
            found[case] = run_adapter(distribute_tensor(head()[0], mesh, [Shard(0)]))
        elif case in GRID:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=GRID[case])
            found[case] = run_layout(mesh, [Shard(0), Shard(0)], [Shard(0), Shard(0)])
        else:
            sizes, *placements = LAYOUTS[case]
            mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
            found[case] = run_layout(mesh, *placements)
    torch.save(found, folder / f"rank{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
