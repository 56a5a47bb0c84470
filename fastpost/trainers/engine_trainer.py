"""What every trainer of ours does beside its method: the engine, and checkpoints to go on from.

Checkpoints are written whole or not at all (`fastpost.checkpoints`), carry what transformers leaves
out, and are refused by a run with another objective or other data (`fastpost.run_manifest`). The
fingerprint of the chat template goes with every saved model, and a model that was trained with
another template or tokenizer is refused at construction (`fastpost.guards.template`). A run
that was killed and resumed computes, bit for bit, what it would have computed undisturbed. For that
a checkpoint also holds

- the loss summed since the last log line, metrics, and rollouts that are still to be trained on;
- the random state in which the epoch began: samplers without a seed of their own draw from it, and
  TRL's `RepeatSampler` would otherwise repeat the order of the first epoch;
- a reference that follows the policy (`sync_ref_model`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from fastpost.adapters.first_backward import tensors_without_gradient
from fastpost.adapters.lora_plus import require_lora_b, split_groups
from fastpost.adapters.saved import check_saved_adapter
from fastpost.backbone import FastpostWarning, PackedBackbone
from fastpost.checkpointed_layers import keep_layer_options
from fastpost.checkpoints import (
    SAVING,
    last_complete_checkpoint,
    publish,
    publish_files,
    read_state,
    recover,
    rotate,
    write_state,
)
from fastpost.guards.reference import fingerprint
from fastpost.guards.template import check_fingerprint, save_fingerprint
from fastpost.references import ReferenceConfig, describe_reference
from fastpost.run_manifest import describe_run, differences, read_manifest, write_manifest
from fastpost_kernels import AdamW8bit

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the trainer of the method, by the order of inheritance

logger = logging.getLogger("fastpost")

# What TRL's trainers hold from one step to the next, by TRL's names.
_HELD_BETWEEN_STEPS = (
    "_metrics",
    "_stored_metrics",
    "stats",
    "_total_train_tokens",
    "_step",
    "_buffered_inputs",
    "entropy_coef",
)


class EngineTrainer(_Trainer):
    """Mixed in before a `transformers.Trainer` of one method.

    Attributes:
        engine: the engine of the policy.
        ref_engine: the engine of the reference model, None where there is no second model.
    """

    engine: PackedBackbone
    ref_engine: PackedBackbone | None
    optimizer_cls_and_kwargs: Any  # transformers' own

    _is_first_step = True
    _lora_plus_groups: Sequence[int] = ()
    _staging: str | None = None
    _manifest: dict[str, Any] | None = None
    _resumed_from: str | None = None
    _resumed_epoch_start: dict[str, Any] | None = None
    _epoch_start: dict[str, Any]
    _train_sampler: Any = None

    def _take_engines(self, engines: Sequence[PackedBackbone]) -> None:
        """Keep what the seam installed: the policy's engine, then the reference's."""
        self.engine = engines[0]
        self.ref_engine = engines[1] if len(engines) > 1 else None
        logger.info(self.engine.report())
        if isinstance(self.args, ReferenceConfig):
            logger.warning("reference: %s", describe_reference(self))
        keep_layer_options(self.model, self.args.activation_checkpointing_kwargs)
        self.add_callback(_GoOnExactly(self))
        check_fingerprint(self.model, self.processing_class)
        if self.args.lora_plus_ratio is not None:
            require_lora_b(self.model, self.args.lora_plus_ratio)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer; with `lora_plus_ratio` its matrices B have groups of their own.

        Raises:
            ValueError: `optimizer` is set, and one was given to the trainer as well.
        """
        is_fresh = self.optimizer is None
        if self.args.optimizer is not None:
            self._name_optimizer()
        super().create_optimizer(*args, **kwargs)
        if is_fresh and self.args.lora_plus_ratio is not None:
            self._lora_plus_groups = split_groups(
                self.optimizer, self.model, self.args.lora_plus_ratio
            )
        return self.optimizer

    def _name_optimizer(self) -> None:
        """`optimizer` of the configuration as the class that transformers makes, in its groups."""
        made = isinstance(getattr(self.optimizer, "optimizer", self.optimizer), AdamW8bit)
        chosen = self.optimizer_cls_and_kwargs
        if (self.optimizer is not None and not made) or (chosen and chosen[0] is not AdamW8bit):
            raise ValueError(
                f"optimizer={self.args.optimizer!r} is set, and the trainer was given an optimizer "
                "of its own (optimizers or optimizer_cls_and_kwargs); leave one of them out"
            )
        options = {
            "lr": self.args.learning_rate,
            "betas": (self.args.adam_beta1, self.args.adam_beta2),
            "eps": self.args.adam_epsilon,
            "seed": self.args.seed % 2**32,
        }
        self.optimizer_cls_and_kwargs = (AdamW8bit, options)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step; after the first one an adapter's tensors without a gradient are named."""
        loss = super().training_step(*args, **kwargs)
        # half precision begins with a loss scale that may overflow; the scaler lowers it
        if self._is_first_step and isinstance(self.model, PeftModel) and not self.args.fp16:
            left_out = tensors_without_gradient(self.model)
            if left_out:
                named = ", ".join(left_out[:8]) + ", ..." * (len(left_out) > 8)
                warn(
                    f"fastpost: {len(left_out)} trained tensors got no finite gradient in the "
                    f"first backward: {named}. "
                    "Their layers are not called, their output is detached, or the loss overflows",
                    FastpostWarning,
                    stacklevel=2,
                )
        self._is_first_step = False
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; beside the learning rate that of LoRA+'s matrices B."""
        if self._lora_plus_groups and "learning_rate" in logs:
            group = self.optimizer.param_groups[self._lora_plus_groups[0]]
            logs["learning_rate_lora_B"] = float(group["lr"])
        super().log(logs, *args, **kwargs)

    def _reference_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights that make up the reference; methods with a reference say which."""
        return iter(())

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, or go on from a checkpoint: the newest complete one for True.

        Raises:
            ValueError: no complete checkpoint is there, or it belongs to another objective or other
                data.
        """
        run_folder = super()._get_output_dir(trial)
        if self.args.should_save:
            for line in recover(run_folder):
                logger.warning("%s: %s", run_folder, line)
        self.accelerator.wait_for_everyone()
        checkpoint = _find_checkpoint(resume_from_checkpoint, run_folder)
        self._manifest = None
        if checkpoint is not None or self.args.save_strategy != SaveStrategy.NO:
            self._manifest = self._describe_run()
        if checkpoint is not None:
            _check_manifest(checkpoint, self._manifest)
        self._resumed_from = checkpoint
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _describe_run(self) -> dict[str, Any]:
        reference = getattr(self, "_precompute_model_hash", None)
        # A shard's digest would depend on when it was sharded.
        if reference is None and not self.is_fsdp_enabled:
            hashes = fingerprint(self._reference_tensors())
            if hashes:
                reference = hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
        return describe_run(
            self.args,
            self.train_dataset,
            reference=reference,
            adapters=getattr(self.model, "peft_config", None),
            rewards=getattr(self, "reward_func_names", None),
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers asks whether it is done after a step: a finished run would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = super()._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = os.path.join(run_folder, SAVING)
        staged, final = os.path.join(self._staging, name), os.path.join(run_folder, name)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if not self.args.save_only_model:
            write_state(staged, self._checkpoint_state(), self.args.process_index)
        best = self.state.best_global_step
        if best and self.args.save_strategy != SaveStrategy.NO:
            best_folder = os.path.join(run_folder, f"checkpoint-{best}")
            if best == self.state.global_step or os.path.isdir(best_folder):
                self.state.best_model_checkpoint = best_folder
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # Once more: the best checkpoint may be this one, which had another name before.
            self.state.save_to_json(os.path.join(staged, "trainer_state.json"))
            write_manifest(staged, self._manifest or self._describe_run())
            publish(staged, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(final)
        if self.args.should_save:
            rotate(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint)
            _remove_if_empty(os.path.join(run_folder, SAVING))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploads run on after this returns: they start once the checkpoint has its final name.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that no file is ever half-written under its name."""
        if self._staging is not None:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or self.args.output_dir
        staged = Path(folder, SAVING, "model")
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        super().save_model(str(staged), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_files(staged, folder)
            _remove_if_empty(staged.parent)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and isinstance(self.model, PeftModel):
            check_saved_adapter(
                output_dir or self.args.output_dir,
                self.model,
                # warm-up begins at a rate of zero
                has_learnt=self.state.global_step
                > 1 + self.args.get_warmup_steps(max(1, self.state.max_steps)),
            )
        if self.args.should_save and self.processing_class is not None:
            save_fingerprint(output_dir or self.args.output_dir, self.processing_class)

    def _checkpoint_state(self) -> dict[str, Any]:
        """What the next step needs beside what transformers saves."""
        state = {
            "held": {name: vars(self)[name] for name in _HELD_BETWEEN_STEPS if name in vars(self)},
            "unlogged_loss": self._tr_loss,
            "last_logged_step": self._globalstep_last_logged,
            # A run resumed at the end of an epoch goes on with the next one, which begins here.
            "epoch_start": self._random_state()
            if float(self.state.epoch).is_integer()
            else self._epoch_start,
        }
        if self._reference_follows_policy():
            state["ref_model"] = dict(self.accelerator.unwrap_model(self.ref_model).state_dict())
        return state

    def _restore_state(self, state: dict[str, Any]) -> None:
        """Take over what `_checkpoint_state` gave."""
        for name, saved in send_to_device(state["held"], self.args.device).items():
            if isinstance(saved, dict) and isinstance(vars(self).get(name), dict):
                _refill(vars(self)[name], saved)
            else:
                setattr(self, name, saved)
        self._tr_loss += state["unlogged_loss"].to(self._tr_loss.device)
        # The mean loss that this call returns is over its own steps.
        self._total_loss_scalar -= state["unlogged_loss"].item()
        self._globalstep_last_logged = state["last_logged_step"]
        self._resumed_epoch_start = state["epoch_start"]
        if self._reference_follows_policy():
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(state["ref_model"])

    def _reference_follows_policy(self) -> bool:
        follows = getattr(self.args, "sync_ref_model", False) and self.ref_model is not None
        if follows and self.is_fsdp_enabled:
            raise ValueError(
                "sync_ref_model=True cannot be checkpointed under FSDP: the reference that follows "
                "the policy is sharded. Set save_strategy='no', or sync_ref_model=False"
            )
        return bool(follows)

    def _restore_from_checkpoint(self) -> None:
        if self._resumed_from is None:
            return
        state = read_state(self._resumed_from, self.args.process_index)
        if state is None:
            warn(
                f"fastpost: {self._resumed_from} holds no state of ours for process "
                f"{self.args.process_index} (another trainer or number of processes wrote it, or "
                "save_only_model): training goes on, but not exactly where it stopped",
                FastpostWarning,
                stacklevel=2,
            )
        else:
            self._restore_state(state)
        self._resumed_from = None

    def _random_state(self) -> dict[str, Any]:
        """What the order of an epoch's rows is drawn from."""
        generator = getattr(self._train_sampler, "generator", None)
        return {
            "torch": torch.random.get_rng_state(),
            "sampler": generator.get_state() if isinstance(generator, torch.Generator) else None,
        }

    def _mark_epoch_start(self) -> None:
        resumed, self._resumed_epoch_start = self._resumed_epoch_start, None
        if resumed is not None:
            torch.random.set_rng_state(resumed["torch"])
            if resumed["sampler"] is not None:
                self._train_sampler.generator.set_state(resumed["sampler"])
        self._epoch_start = self._random_state()


class _GoOnExactly(TrainerCallback):
    """Tells the trainer when transformers has set its counters, and when an epoch begins."""

    def __init__(self, trainer: EngineTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._restore_from_checkpoint()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._mark_epoch_start()


def _find_checkpoint(asked: str | bool | None, run_folder: str) -> str | None:
    if asked is not True:
        return str(asked) if asked else None
    found, unfinished = last_complete_checkpoint(run_folder)
    if unfinished:
        logger.warning("%s: passed over %s, half-written", run_folder, ", ".join(unfinished))
    if found is None:
        raise ValueError(
            f"resume_from_checkpoint=True, but {run_folder} has no complete checkpoint; pass the "
            "path of one, or None to start from the beginning"
        )
    return found


def _check_manifest(checkpoint: str, now: dict[str, Any] | None) -> None:
    before = read_manifest(checkpoint)
    if before is None or now is None:
        warn(
            f"fastpost: {checkpoint} does not say what it was trained for (another trainer wrote "
            "it); objective and data are not compared",
            FastpostWarning,
            stacklevel=3,
        )
        return
    forbidding, telling = differences(before, now)
    if forbidding:
        raise ValueError(
            f"{checkpoint} belongs to another run; going on from it would mix two objectives or "
            "data sets:\n  " + "\n  ".join(forbidding) + "\nSet these back to resume, or start a "
            "new run from the saved weights: model=<checkpoint>, another output_dir"
        )
    if telling:
        warn(
            f"fastpost: resumed from {checkpoint} with other settings, so not bit for bit:\n  "
            + "\n  ".join(telling),
            FastpostWarning,
            stacklevel=3,
        )


def _refill(holder: dict[str, Any], saved: dict[str, Any]) -> None:
    """Put saved values into a dict whose inner dicts make their own entries (`defaultdict`)."""
    for name, value in saved.items():
        if isinstance(value, dict):
            _refill(holder[name], value)
        else:
            holder[name] = value


def _remove_if_empty(folder: str | Path) -> None:
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)


__all__ = ["EngineTrainer"]
