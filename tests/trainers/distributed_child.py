"""One process of a data-parallel run: `python -m tests.trainers.distributed_child FOLDER CASE...`

Started by `test_distributed` with the variables torchrun would set. Runs the cases one after the
other and leaves what each computed in FOLDER, one file per case and rank.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig

from fastpost import load_nf4
from fastpost.rollout.interface import Completions
from tests.trainers import footprint, methods
from tests.trainers.methods import METHODS, Method

GLOBAL_BATCH = 4
LORA = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
DORA = dataclasses.replace(LORA, use_dora=True)

# Case -> method, config fields, constructor arguments.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SFT": ("SFT", {}, {}),
    "SFT-accumulation": ("SFT", {"gradient_accumulation_steps": 2}, {}),
    "SFT-tokens-per-device": ("SFT", {"average_tokens_across_devices": False}, {}),
    "DPO": ("DPO", {}, {}),
    "DPO-accumulation": ("DPO", {"gradient_accumulation_steps": 2}, {}),
    "DPO-checkpointing": ("DPO", {"gradient_checkpointing": True}, {}),
    "DPO-lora": ("DPO", {}, {"peft_config": LORA, "ref_model": None}),
    "DPO-dora": ("DPO", {}, {"peft_config": DORA, "ref_model": None}),
    "SFT-dora": ("SFT", {}, {"peft_config": DORA}),
    "SFT-nf4": ("SFT", {}, {"peft_config": LORA}),
    "DPO-nf4-dora": ("DPO", {}, {"peft_config": DORA, "ref_model": None}),
    "KTO": ("KTO", {"loss_type": "apo_zero_unpaired"}, {}),
    "CPO": ("CPO", {}, {}),
    "ORPO": ("ORPO", {}, {}),
    "Reward": ("Reward", {}, {}),
    "PRM": ("PRM", {}, {}),
    "GRPO": ("GRPO", {"beta": 0.1}, {}),
    "RLOO": ("RLOO", {}, {}),
    "OnlineDPO": ("OnlineDPO", {}, {}),
    "PPO": ("PPO", {}, {}),
}


class FixedRollout:
    """Completions that depend on the prompt and on how often it came before in the batch."""

    def generate(self, prompt_ids: list[list[int]]) -> Completions:
        seen: dict[tuple[int, ...], int] = {}
        completions = []
        for prompt in prompt_ids:
            count = seen[tuple(prompt)] = seen.get(tuple(prompt), 0) + 1
            start = sum(prompt) + 31 * count
            length = 4 + (start % 4)
            completions.append([3 + (start * (i + 7)) % 250 for i in range(length)])
        return Completions(completions, None)


def equal_lengths(method: Method) -> Any:
    """Rows of one length, for losses that are means over the tokens of a micro-batch."""
    rows = method.data()
    turn = [{"role": "user", "content": "add the two numbers"}]
    return rows.map(
        lambda row, i: {
            "prompt": turn,
            "chosen": [{"role": "assistant", "content": f"it is {i:03d}"}],
            "rejected": [{"role": "assistant", "content": f"or {i:03d}"}],
        },
        with_indices=True,
    )


def run_case(case: str, folder: Path, num_processes: int) -> dict[str, Any]:
    """What a run of two steps on the same global batches computes."""
    name, config, arguments = CASES[case]
    method = METHODS[name]
    accumulation = config.get("gradient_accumulation_steps", 1)
    settings = methods.settings_of(
        method,
        folder / f"{case}-{num_processes}",
        per_device_train_batch_size=GLOBAL_BATCH // num_processes // accumulation,
        max_steps=2,
        optim="sgd",
        learning_rate=0.02,
        max_grad_norm=0.0,
        **({"ddp_backend": "gloo"} if num_processes > 1 else {}),
        **config,
    )
    if "nf4" in case:
        model = load_nf4(folder / name, dtype=torch.float32, device="cpu")
    else:
        model = method.model()
    model.config._name_or_path = str(folder / name)
    options = method.options(torch.float32) | arguments
    if options.get("ref_model", model) is None:
        del options["ref_model"]
    data = equal_lengths(method) if name in ("CPO", "ORPO") else None
    trainer = methods.build_trainer(method, settings, model, data, **options)
    if hasattr(trainer, "rollout"):
        trainer.rollout = FixedRollout()
    found = footprint.run(trainer, footprint.Watch())
    trainer.engine.remove()
    kept = {name: found[name] for name in ("loss", "metrics", "gradients", "weights")}
    # DDP puts a prefix before every name.
    for part in ("gradients", "weights"):
        kept[part] = {k.removeprefix("module."): v for k, v in kept[part].items()}
    return kept


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    for case in cases:
        result = run_case(case, folder, int(os.environ["WORLD_SIZE"]))
        torch.save(result, folder / f"{case}-rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()
    (folder / f"done-{os.environ['RANK']}.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main()
