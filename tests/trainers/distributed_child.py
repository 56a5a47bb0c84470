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
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

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
# A model whose layers are spread over the processes; "nf4" in a name loads its weights in 4 bits.
for _kind, _adapter in (("", None), ("-lora", LORA), ("-dora", DORA), ("-nf4", LORA)):
    _extra = {} if _adapter is None else {"peft_config": _adapter}
    _own = {} if _adapter is None else {"ref_model": None}
    CASES |= {
        f"SFT-fsdp{_kind}": ("SFT", {"fsdp": True}, _extra),
        f"DPO-fsdp{_kind}": ("DPO", {"fsdp": True}, _extra | _own),
        f"GRPO-fsdp{_kind}": ("GRPO", {"fsdp": True, "beta": 0.1}, _extra),
    }
# The reference pass, with the adapter off, is the first of the model.
CASES["DPO-fsdp-lora-half"] = ("DPO", {"fsdp": True}, {"peft_config": LORA, "ref_model": None})
CASES["GRPO-fsdp-bf16"] = ("GRPO", {"fsdp": True, "beta": 0.1, "bf16": True}, {})
# transformers loads every process's shard, and only that, straight from the files.
CASES |= {
    "SFT-loaded": ("SFT", {}, {}),
    "SFT-loaded-lora": ("SFT", {}, {"peft_config": LORA}),
    "DPO-loaded": ("DPO", {}, {}),
    "DPO-loaded-lora": ("DPO", {}, {"peft_config": LORA, "ref_model": None}),
    "GRPO-loaded": ("GRPO", {"beta": 0.1}, {}),
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


class RootOutputs(TrainerCallback):
    """Keeps the log-probs that leave the model, behind whatever FSDP2 does to them."""

    def __init__(self, returned: list[torch.Tensor]) -> None:
        self.returned = returned

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            kwargs["model"].register_forward_hook(
                lambda module, args, output: self.returned.append(output.log_probs.detach())
            )


def check_shards(trainer: Any, was_loaded: bool) -> None:
    """Every layer of policy and reference is a unit of its own, and each process holds half."""
    for model in (trainer.model_wrapped, getattr(trainer, "ref_model", None)):
        if model is None:
            continue
        blocks = next(m for n, m in model.named_modules() if n.endswith(".layers"))
        assert len(blocks) and all(isinstance(block, FSDPModule) for block in blocks)
        for name, parameter in model.named_parameters():
            # PEFT adds an adapter after transformers has spread the model it loads.
            assert isinstance(parameter, DTensor) or (was_loaded and "lora_" in name), name
        spread = [p for p in model.parameters() if isinstance(p, DTensor)]
        local = sum(p.to_local().numel() for p in spread)
        assert abs(local / sum(p.numel() for p in spread) - 0.5) < 0.05
        packed = [p for n, p in model.named_parameters() if n.endswith("packed")]
        assert all(2 * p.to_local().numel() == p.numel() for p in packed)
        if not getattr(model, "peft_config", None):
            continue
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert frozen and all(p.grad is None for p in frozen)


def make_model(case: str, folder: Path, num_processes: int) -> Any:
    """The model of a case from the folder that holds one per method."""
    name = CASES[case][0]
    if "nf4" in case:
        model = load_nf4(folder / name, dtype=torch.float32, device="cpu")
    elif "loaded" in case:
        spread = {"distributed_config": DistributedConfig(fsdp_size=num_processes)}
        model = AutoModelForCausalLM.from_pretrained(
            folder / f"{name}-untied", dtype=torch.float32, **(spread if num_processes > 1 else {})
        )
    else:
        model = METHODS[name].model()
    if "half" in case:
        model.to(torch.bfloat16)
    model.config._name_or_path = str(folder / name)
    return model


def run_case(case: str, folder: Path, num_processes: int) -> dict[str, Any]:
    """What a run of two steps on the same global batches computes."""
    name, config, arguments = CASES[case]
    method = METHODS[name]
    if num_processes == 1:
        config = {name: value for name, value in config.items() if name != "fsdp"}
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
    model = make_model(case, folder, num_processes)
    options = method.options(torch.float32) | arguments
    if options.get("ref_model", model) is None:
        del options["ref_model"]
    data = equal_lengths(method) if name in ("CPO", "ORPO") else None
    trainer = methods.build_trainer(method, settings, model, data, **options)
    if hasattr(trainer, "rollout"):
        trainer.rollout = FixedRollout()
    returned: list[torch.Tensor] = []
    if "bf16" in case:
        trainer.add_callback(RootOutputs(returned))
    found = footprint.run(trainer, footprint.Watch())
    if num_processes > 1 and ("fsdp" in config or "loaded" in case):
        check_shards(trainer, "loaded" in case)
    trainer.engine.remove()
    found["returned"] = returned
    kept = {name: found[name] for name in ("returned", "loss", "metrics", "gradients", "weights")}
    # DDP puts a prefix before every name.
    for part in ("gradients", "weights"):
        kept[part] = {k.removeprefix("module."): v for k, v in kept[part].items()}
    return kept


def shard_on_cpus() -> None:
    """accelerate shards on accelerators only; of what it asks none is needed by FSDP2 itself."""
    make_state = AcceleratorState.__init__

    def make(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = make


def main() -> None:
    shard_on_cpus()
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    for case in cases:
        # transformers hands its settings to accelerate by the environment, and leaves them there.
        for name in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_"))]:
            del os.environ[name]
        result = run_case(case, folder, int(os.environ["WORLD_SIZE"]))
        torch.save(result, folder / f"{case}-rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()
    (folder / f"done-{os.environ['RANK']}.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main()
