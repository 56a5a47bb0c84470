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
from typing import Any
from warnings import warn

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from fastpost.adapters.first_backward import tensors_without_gradient
from fastpost.adapters.lora_plus import require_lora_b, split_groups
from fastpost.backbone import FastpostWarning, PackedBackbone
from fastpost.checkpointed_layers import keep_layer_options
from fastpost.checkpoints import (
    SAVING,
    last_complete_checkpoint,
    publish_files,
    recover,
    remove_if_empty,
    write_state,
)
from fastpost.guards.reference import fingerprint
from fastpost.guards.template import check_fingerprint, save_fingerprint
from fastpost.optimizer_in_backward import BackwardSteps, refuse_surroundings
from fastpost.references import ReferenceConfig, describe_reference
from fastpost.run_manifest import describe_run, differences, read_manifest, write_manifest
from fastpost.sharding import check_sharding, keep_precision, settle_gradients
from fastpost.tiled_mlp import tile
from fastpost.trainers.sharded_checkpoints import ShardedCheckpoints
from fastpost_kernels import AdamW8bit

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


class EngineTrainer(ShardedCheckpoints):
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
    _backward_steps: BackwardSteps | None = None
    _manifest: dict[str, Any] | None = None
    _resumed_from: str | None = None
    _resumed_epoch_start: dict[str, Any] | None = None
    _epoch_start: dict[str, Any]
    _train_sampler: Any = None

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; where it shards, nothing is rounded that need not be."""
        super().create_accelerator_and_postprocess()
        keep_precision(self.accelerator)

    def _take_engines(self, engines: Sequence[PackedBackbone]) -> None:
        """Keep what the seam installed: the policy's engine, then the reference's."""
        self.engine = engines[0]
        self.ref_engine = engines[1] if len(engines) > 1 else None
        logger.info(self.engine.report())
        check_sharding(self)
        if isinstance(self.args, ReferenceConfig):
            logger.warning("reference: %s", describe_reference(self))
        keep_layer_options(self.model, self.args.activation_checkpointing_kwargs)
        self.add_callback(_GoOnExactly(self))
        check_fingerprint(self.model, self.processing_class)
        if self.args.lora_plus_ratio is not None:
            require_lora_b(self.model, self.args.lora_plus_ratio)
        if self.args.optimizer_in_backward:
            refuse_surroundings(self)
        if self.args.mlp_tile_tokens is not None:
            for engine in engines:
                tile(engine.model, self.args.mlp_tile_tokens)
        if self.args.trial_step:
            from fastpost.trainers.trial_step import TrialStep, refuse_trial  # heavy

            refuse_trial(self)
            self.add_callback(TrialStep(self, logger))

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
        if self.args.optimizer_in_backward:
            self._begin_backward_step()
        loss = super().training_step(*args, **kwargs)
        # half precision begins with a loss scale that may overflow; the scaler lowers it
        if self._is_first_step and isinstance(self.model, PeftModel) and not self.args.fp16:
            steps = self._backward_steps
            left_out = (
                tensors_without_gradient(self.model)
                if steps is None
                else steps.tensors_without_gradient()
            )
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

    def _begin_backward_step(self) -> None:
        if self._backward_steps is None:
            # Not earlier: hooks of callbacks must see the gradients before these free them.
            refuse_surroundings(self)
            optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            self._backward_steps = BackwardSteps(self.model, optimizer)
        self._backward_steps.begin()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self._backward_steps is not None:
            return self._backward_steps.gradient_norm()
        return super()._get_grad_norm(model, grad_norm)

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
        self._finish_saving()
        run_folder = super()._get_output_dir(trial)
        if self.args.should_save:
            for line in recover(run_folder):
                logger.warning("%s: %s", run_folder, line)
        self.accelerator.wait_for_everyone()
        checkpoint = _find_checkpoint(resume_from_checkpoint, run_folder)
        self._manifest = None
        if checkpoint is not None or self.args.save_strategy != SaveStrategy.NO:
            self._manifest = self._describe_run()
            self._refuse_small_disk(run_folder)
        if checkpoint is not None:
            _check_manifest(checkpoint, self._manifest)
            self._check_processes(checkpoint)
        self._resumed_from = checkpoint
        try:
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self._backward_steps is not None:
                self._backward_steps.remove()
                self._backward_steps = None

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
            model=self.model,
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
        self._finish_saving()
        run_folder = super()._get_output_dir(trial)
        self._refuse_full_disk(run_folder)
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
        if self.args.should_save:
            # Once more: the best checkpoint may be this one, which had another name before.
            self.state.save_to_json(os.path.join(staged, "trainer_state.json"))
            write_manifest(staged, self._manifest or self._describe_run())
        self._publish(staged, final)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(final)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploads run on after this returns: they start once the checkpoint has its final name.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that no file is ever half-written under its name."""
        if self._staging is not None:
            super().save_model(output_dir, _internal_call)
            return
        self._finish_saving()
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
            remove_if_empty(staged.parent)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._check_saved(output_dir or self.args.output_dir)
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
        state = self._read_own_state(self._resumed_from)
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
        settle_gradients(self._trainer.model_wrapped)
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


__all__ = ["EngineTrainer"]
