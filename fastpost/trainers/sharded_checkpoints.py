"""Checkpoints of a trainer whose model FSDP2 shards, and the naming of all checkpoints.

A sharded model is saved shard by shard (`fastpost.checkpoints.sharded`) in the background: the
files that transformers and `EngineTrainer` write beside are done when `_save_checkpoint` returns,
and the folder gets its name when the shards of all processes are on the disk. What needs it under
its name waits: the next save, the best model, uploads, the end of training.

A model that is not sharded is saved as transformers saves it, and goes on from sharded checkpoints
too.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from fastpost.adapters.saved import check_saved_adapter
from fastpost.checkpoints import num_processes, publish, read_state, remove_if_empty, rotate
from fastpost.checkpoints.block_scales import SMALL, has_same_blocks
from fastpost.checkpoints.disk_space import (
    CheckpointSize,
    bytes_of,
    expected_states,
    refuse_if_full,
    refuse_if_too_many,
)
from fastpost.checkpoints.model_files import write_adapters, write_description, write_model
from fastpost.checkpoints.sharded import (
    contents_of,
    is_sharded,
    load_model,
    load_optimizer,
    read_about,
    save_shards,
    write_about,
)
from fastpost.guards.template import save_fingerprint
from fastpost_kernels import AdamW8bit

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the trainer of the method, by the order of inheritance

__all__ = ["ShardedCheckpoints"]


class ShardedCheckpoints(_Trainer):
    """Mixed in before a `transformers.Trainer`; see the module."""

    _staging: str | None = None
    _shards_saving: Future[Any] | None = None
    _naming: Future[None] | None = None
    _saving_group: Any = None

    def _refuse_unsavable(self) -> None:
        """Refuse, at construction, checkpoints that a sharded model cannot have.

        Raises:
            ValueError: names the option and what to use instead.
        """
        if not self._will_shard():
            return
        contents_of(self.model)
        if self.args.save_on_each_node:
            raise ValueError(
                "save_on_each_node=True keeps each node's files on its own disk; the shards of a "
                "checkpoint must lie together. Give an output_dir that all nodes share"
            )
        if self.args.push_to_hub and HubStrategy(self.args.hub_strategy) != HubStrategy.END:
            raise ValueError(
                "checkpoints of a sharded model cannot be loaded from the hub as they are; set "
                "hub_strategy='end', or upload what `fastpost export` makes of one"
            )

    def _will_shard(self) -> bool:
        return self.is_fsdp_enabled or self._model_is_sharded()

    def _model_is_sharded(self) -> bool:
        # With `fsdp` it is whole until training begins. Around a base that transformers spread at
        # loading, adapters are whole in every process, and saved as those of any other model.
        return isinstance(self.model, FSDPModule)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._model_is_sharded():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self._saving_group is None:
            # Of its own: the thread must not take part in the trainer's exchanges.
            self._saving_group = dist.new_group(backend="gloo")
        contents, optimizer = contents_of(self.model), _plain(self.optimizer)
        if self.args.should_save:
            write_about(output_dir, contents, self.model, optimizer)
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
        self._shards_saving = save_shards(
            output_dir, contents, self.model, optimizer, self._saving_group
        )

    def _refuse_full_disk(self, run_folder: str) -> None:
        """Before a save: whether the disk holds one more checkpoint."""
        optimizer = _plain(self.optimizer)
        states = (
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        size = CheckpointSize(
            bytes_of(self._saved_parameters()),
            0 if self.args.save_only_model else bytes_of(states),
        )
        self._on_first(lambda: refuse_if_full(run_folder, size))

    def _refuse_small_disk(self, run_folder: str) -> None:
        """Before training: whether the disk holds all checkpoints there will be."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        size = CheckpointSize(
            bytes_of(self._saved_parameters()),
            0
            if self.args.save_only_model
            else expected_states(
                self.args.optimizer or OptimizerNames(self.args.optim).value, trained
            ),
        )
        limit = self.args.save_total_limit
        self._on_first(lambda: refuse_if_too_many(run_folder, size, self._count_saves(), limit))

    def _saved_parameters(self) -> list[Tensor]:
        adapters_only = isinstance(self.model, PeftModel)
        return [p for p in self.model.parameters() if p.requires_grad or not adapters_only]

    def _count_saves(self) -> int:
        """Checkpoints from the beginning of the run to its end, as far as it can be known."""
        rows = self.args.train_batch_size * self.args.world_size
        batches = (
            -(-len(self.train_dataset) // rows) if isinstance(self.train_dataset, Sized) else 0
        )
        an_epoch = max(1, batches // self.args.gradient_accumulation_steps)
        steps = self.args.max_steps
        if steps <= 0:
            steps = math.ceil(an_epoch * self.args.num_train_epochs)
        if self.args.save_strategy == SaveStrategy.STEPS:
            every = self.args.save_steps
            return math.ceil(steps / (every if every >= 1 else math.ceil(steps * every)))
        if self.args.save_strategy == SaveStrategy.EPOCH:
            return math.ceil(steps / an_epoch) if batches else 1
        return 0 if self.args.save_strategy == SaveStrategy.NO else 1

    def _on_first(self, check: Callable[[], None]) -> None:
        """Refuse in all processes what `check` refuses in the first: disks fill meanwhile."""
        refused: list[str | None] = [None]
        if self.args.process_index == 0:
            try:
                check()
            except ValueError as error:
                refused = [str(error)]
        broadcast_object_list(refused)
        if refused[0] is not None:
            raise ValueError(refused[0])

    def _publish(self, staged: str, final: str) -> None:
        """Give a checkpoint its name, once it is written, and delete what is beyond the limit."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        run_folder = Path(final).parent
        saving, is_namer = self._shards_saving, self.args.should_save

        def name_it() -> None:
            if saving is not None:
                saving.result()
            publish(staged, final)
            rotate(run_folder, limit, best)
            remove_if_empty(Path(staged).parent)

        self.accelerator.wait_for_everyone()
        if saving is None:
            if is_namer:
                name_it()
            self.accelerator.wait_for_everyone()
        elif is_namer:
            executor = ThreadPoolExecutor(1, "checkpoint")
            self._naming = executor.submit(name_it)
            executor.shutdown(wait=False)
        if self.args.push_to_hub:
            self._finish_saving()

    def _finish_saving(self) -> None:
        """Wait until the last checkpoint has its name. All processes call it.

        Raises:
            Exception: what went wrong in the background.
        """
        if self._shards_saving is None:
            return
        saving, naming = self._shards_saving, self._naming
        self._shards_saving = self._naming = None
        saving.result()
        if naming is not None:
            naming.result()
        self.accelerator.wait_for_everyone()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_saving()
        return super()._finalize_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as transformers or PEFT load it; of a checkpoint, what is not sharded."""
        if not self._model_is_sharded():
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self._save_beside(folder)
        if self._staging is None or self._wants_whole_weights():
            contents = contents_of(self.model)
            tensors = {name: (tuple(t.shape), t.dtype) for name, t in contents.tensors.items()}

            def read(name: str) -> Tensor:
                return _whole(contents.tensors[name])

            is_writer = self.args.should_save
            if contents.adapters:
                write_adapters(folder, contents.adapters, tensors, read, is_writer=is_writer)
                if is_writer:
                    self._check_saved(folder)
            else:
                write_model(folder, tensors, read, is_writer=is_writer)

    def _check_saved(self, folder: str | Path) -> None:
        """Reopen what was saved of an adapter; another model passes."""
        if isinstance(self.model, PeftModel):
            # warm-up begins at a rate of zero
            warm_up = self.args.get_warmup_steps(max(1, self.state.max_steps))
            has_learnt = self.state.global_step > 1 + warm_up
            check_saved_adapter(folder, self.model, has_learnt=has_learnt)

    def _wants_whole_weights(self) -> bool:
        """Whether a checkpoint was asked to have whole weights, beside shards or alone."""
        asked = (self.args.fsdp_config or {}).get("state_dict_type", "")
        return self.args.save_only_model or str(asked).upper().endswith("FULL_STATE_DICT")

    def _save_beside(self, folder: Path) -> None:
        write_description(folder, self.model)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
            save_fingerprint(folder, self.processing_class)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_sharded(resume_from_checkpoint):
            load_model(resume_from_checkpoint, self.model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(checkpoint, self.model, _plain(self.optimizer))
        with warnings.catch_warnings():
            # The schedulers of PyTorch warn that an optimizer's state should be loaded as well.
            warnings.simplefilter("ignore", UserWarning)
            self.lr_scheduler.load_state_dict(
                torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
            )

    def _check_processes(self, checkpoint: str) -> None:
        """Whether a checkpoint can be resumed by these processes, before it is read.

        Raises:
            ValueError: it holds what belongs to each process, and there were more or fewer; it was
                not sharded, and this run shards.
        """
        if self._will_shard() and not _has_shards(checkpoint):
            raise ValueError(
                f"{checkpoint} is of a model that was not sharded, this run shards (FSDP2): resume "
                "it without, or start from its weights: model=<checkpoint>, in another "
                "output_dir"
            )
        before, now = num_processes(checkpoint), self.args.world_size
        if before in (0, now):
            return
        held = (read_state(checkpoint, 0) or {}).get("held", {})
        reasons = []
        if held.get("_buffered_inputs") is not None:
            reasons.append("rollouts that each process is still to be trained on")
        if self.args.train_sampling_strategy == "group_by_length":
            reasons.append("an order of rows that is drawn by rows of a process (group_by_length)")
        if is_sharded(checkpoint) and read_about(checkpoint)["optimizer"] == AdamW8bit.__name__:
            trained = (p for p in self.model.parameters() if p.requires_grad)
            shapes = [tuple(p.shape) for p in trained if p.numel() >= SMALL]
            shards = (before, now if self._will_shard() else 1)
            reasons += [
                f"8-bit states of a weight {list(shape)}, whose blocks depend on the processes"
                for shape in shapes
                if not all(has_same_blocks(shape, count) for count in shards)
            ][:1]
        if reasons:
            raise ValueError(
                f"{checkpoint} was written by {before} processes, this run has {now}. It holds "
                f"{' and '.join(reasons)}: resume it with {before}, or start from its weights "
                "(`fastpost export`), model=<exported>, in another output_dir"
            )

    def _read_own_state(self, checkpoint: str) -> dict[str, Any] | None:
        """What `EngineTrainer` wrote for this process; with other processes, the first one's, and
        the mean loss of all, as logging takes it."""
        before = num_processes(checkpoint)
        if before in (0, self.args.world_size):
            return read_state(checkpoint, self.args.process_index)
        states = [read_state(checkpoint, rank) or {} for rank in range(before)]
        losses = torch.stack([state["unlogged_loss"].float() for state in states])
        return states[0] | {"unlogged_loss": losses.mean()}

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and is_sharded(best):
            load_model(best, self.model)
        else:
            super()._load_best_model()


def _has_shards(checkpoint: str) -> bool:
    """Ours, or those that accelerate wrote for another trainer."""
    return is_sharded(checkpoint) or any(Path(checkpoint).glob("pytorch_model_fsdp*"))


def _plain(optimizer: Any) -> Optimizer:
    """The optimizer without accelerate's wrapper."""
    found: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor on the CPU; all processes call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
