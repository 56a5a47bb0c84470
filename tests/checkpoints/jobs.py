"""What the processes of `forked` do."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

import fastpost
from fastpost import load_nf4
from fastpost.checkpoints import last_complete_checkpoint, recover
from tests.trainers import methods
from tests.trainers.distributed_child import shard_on_cpus
from tests.trainers.methods import METHODS
from tests.trainers.resumable import SETTINGS

assert fastpost.SFTTrainer and fastpost.DPOTrainer  # imported once, before the processes part

LORA = LoraConfig(
    r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
)
DORA = LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
_FILE_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}
ADAPTERS = {None: None, "lora": LORA, "dora": DORA}


def make_trainer(
    folder: str,
    method: str = "SFT",
    adapter: str | None = None,
    in_4_bits: bool = False,
    is_sharded: bool = True,
    rows: int = 4,
    dtype: str = "float32",
    vocabulary: int | None = None,
    at_loading: bool = False,
    **config: Any,
) -> Any:
    """A trainer of `rows` rows a step, whatever the number of processes; the same every time."""
    if at_loading:
        dist.init_process_group("gloo")
    elif is_sharded:
        shard_on_cpus()
        config["fsdp"] = True
    kind, processes = METHODS[method], int(os.environ["WORLD_SIZE"])
    saved = Path(folder).parent / f"{method}-policy"
    if in_4_bits:
        model = load_nf4(saved, dtype=torch.float32, device="cpu")
    elif at_loading:
        spread = DistributedConfig(fsdp_size=processes)
        model = AutoModelForCausalLM.from_pretrained(
            f"{saved}-untied", dtype=torch.float32, distributed_config=spread
        )
    else:
        other = {} if vocabulary is None else {"vocab_size": vocabulary}
        model = kind.model(**other).to(getattr(torch, dtype))
    model.config._name_or_path = str(saved)
    options = kind.options(torch.float32)
    if adapter:
        options = {"peft_config": ADAPTERS[adapter]}
    if "eval_strategy" in config:
        options |= {"eval_dataset": kind.data()}
    settings = methods.settings_of(
        kind,
        Path(folder),
        **SETTINGS
        | {"ddp_backend": "gloo", "logging_steps": 1, "max_steps": 4}
        | {"per_device_train_batch_size": rows // processes}
        | config,
    )
    return methods.build_trainer(kind, settings, model, None, **options)


def rest() -> None:
    """Nothing: the answer says that everything is imported."""


def train(folder: str, resume: bool | str = False, **options: Any) -> Any:
    """A run, from its beginning or a checkpoint."""
    trainer = make_trainer(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def load_best(folder: str, **options: Any) -> None:
    """Leave in `folder`/state.pt what a run holds that ended with its best checkpoint: the one of
    the highest loss, so that it is not the last."""
    trainer = train(
        folder,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_steps=1,
        save_total_limit=1,
        **options,
    )
    state = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(state, Path(folder, "state.pt"))


def train_while_saving(folder: str, **options: Any) -> None:
    """The disk of checkpoint 2 waits for step 3: a save that is not in the background hangs."""
    stock, step_3 = HuggingFaceStorageWriter.write_data, threading.Event()

    def write_data(self: Any, *args: Any) -> Any:
        if "checkpoint-2" in str(self.path):
            assert step_3.wait(timeout=300), "training did not go on"
            assert not Path(folder, "checkpoint-2").exists()
        return stock(self, *args)

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                step_3.set()

    HuggingFaceStorageWriter.write_data = write_data
    trainer = make_trainer(folder, **options)
    trainer.add_callback(Tell())
    trainer.train()


def train_on_failing_disk(folder: str, **options: Any) -> None:
    """The disk of the second process fails while the checkpoint of step 2 is written."""
    stock = HuggingFaceStorageWriter.write_data

    def write_data(self: Any, *args: Any) -> Any:
        if "checkpoint-2" in str(self.path) and dist.get_rank() == 1:
            raise OSError("the disk of this test failed")
        return stock(self, *args)

    HuggingFaceStorageWriter.write_data = write_data
    train(folder, **options)


def train_until_killed(
    folder: str, kill_at: int | None = None, count_into: str | None = None, **options: Any
) -> None:
    """A run from its newest checkpoint, or the beginning, that may kill itself.

    Args:
        kill_at: before which opening, renaming, making or removing of a file in `folder`.
        count_into: file that is told how many of these there were.
    """
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _FILE_EVENTS and any(str(part).startswith(folder) for part in arguments):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    recover(folder)
    train(folder, last_complete_checkpoint(folder)[0] is not None, **options)
    if count_into:
        Path(count_into).write_text(str(seen))


def load_only(folder: str, checkpoint: str, **options: Any) -> None:
    """Leave in `folder`/state.pt what a run holds when it has loaded a checkpoint."""
    step = int(checkpoint.rpartition("-")[2])
    trainer = train(folder, checkpoint, **options | {"max_steps": step})
    names = {p: name for name, p in trainer.model.named_parameters()}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    state = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    for parameter, states in optimizer.state.items():
        for key, value in states.items():
            state[f"optimizer/{names[parameter]}/{key}"] = whole(value)
    if dist.get_rank() == 0:
        torch.save(state, Path(folder, "state.pt"))


def save_model(folder: str, output: str, **options: Any) -> None:
    """Train and save as users do at the end."""
    train(folder, **options).save_model(output)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
