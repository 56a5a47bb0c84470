"""What the trainers share that learn from groups of sampled completions (GRPO, RLOO).

Beside the engine: groups stay together (`group_order`), completions come from a `Rollout`, the
distance of sampling and learning model is measured, and the reference is watched.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any, ClassVar
from warnings import warn

from torch import Tensor
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from fastpost.guards.columns import column_names, require_columns, require_rows
from fastpost.guards.reference import fingerprint, refuse_shared_reference
from fastpost.references import check_reference, drop_reference_adapter, has_adapter
from fastpost.rollout.interface import Completions, Rollout
from fastpost.rollout.mismatch import MismatchMeter
from fastpost.rollout.transformers_rollout import TransformersRollout
from fastpost.rollout.vllm_rollout import VLLMRollout, require_vllm
from fastpost.scoring import Engine, FastpostWarning
from fastpost.trainers.engine_config import as_config, refuse_unsupported
from fastpost.trainers.engine_trainer import EngineTrainer
from fastpost.trainers.group_order import groups_kept_together, warn_of_split_groups
from fastpost.trainers.reference_guard import ReferenceGuard


def as_group_config(args: Any, config_class: type[Any]) -> Any:
    """`args` as our config (see `as_config`)."""
    if not isinstance(args, config_class) and hasattr(args, "generation_batch_size"):
        args = copy.copy(args)
        # TRL has filled it in from steps_per_generation, and refuses to be given both.
        args.generation_batch_size = None
    return as_config(args, config_class)


def refuse_before_loading(
    args: Any, model: Any, peft_config: Any, train_dataset: Any, method: str, has_tools: bool
) -> None:
    """Refuse before anything is loaded what would fail later.

    Raises:
        ImportError: vLLM is asked for and not installed.
        ValueError: an option the engine cannot honour, or a data set without prompts.
    """
    adapter = has_adapter(model, peft_config)
    check_reference(args, method, ("base" if adapter else "frozen", "none"), adapter)
    refuse_unsupported(args)
    if args.use_vllm:
        require_vllm()
    if args.use_vllm and args.rollout_dtype is not None:
        raise ValueError(
            "rollout_dtype is the dtype of a transformers copy; with use_vllm=True vLLM samples "
            "from its own. Set rollout_dtype=None"
        )
    if has_tools and args.use_transformers_continuous_batching and (args.bf16 or args.fp16):
        raise ValueError(
            "tools and environments sample through TRL, which casts the trained weights for good "
            "with continuous batching and bf16 or fp16; set use_transformers_continuous_batching="
            "False, or bf16=False"
        )
    if train_dataset is not None:
        require_rows(train_dataset, "train_dataset")
        if not has_tools:
            require_columns(column_names(train_dataset), [["prompt"]], method)
    warn_of_split_groups(args)


class GroupTrainer(ReferenceGuard, EngineTrainer):
    """Mixed in before `trl.GRPOTrainer` or `trl.RLOOTrainer`.

    Attributes:
        rollout: samples the completions of text prompts.
        mismatch: how far sampling and learning model are apart; None where both are one.
    """

    _trl_module: ClassVar[ModuleType]
    rollout: Rollout
    mismatch: MismatchMeter | None

    def _set_up(self: Any, engines: list[Engine]) -> None:
        """After TRL's constructor: engines, rollout, guards."""
        drop_reference_adapter(self.args, self.model)
        self._take_engines(engines)
        args = self.args
        is_apart = args.use_vllm or args.rollout_dtype is not None
        needs_meter = is_apart or args.rollout_mismatch_limit is not None
        self.mismatch = MismatchMeter(args.rollout_mismatch_limit) if needs_meter else None
        self.rollout = self._make_rollout(needs_meter)
        refuse_shared_reference(self.model, self.ref_model)
        self._warn_of_other_reference()
        if self.beta != 0.0:
            self._guard_reference()

    def _make_rollout(self: Any, needs_logps: bool) -> Rollout:
        if self.use_vllm:
            return VLLMRollout(
                self.vllm_generation,
                self._current_num_generations,
                lambda: self.state.global_step,
            )
        return TransformersRollout(
            self._lend_model,
            self.generation_config,
            rollout_dtype=self.args.rollout_dtype,
            continuous_batching=self.continuous_batching_config,
            pad_to_multiple_of=self.pad_to_multiple_of,
            needs_logps=needs_logps,
        )

    def _current_num_generations(self: Any) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _lend_model(self: Any) -> Any:
        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            generation_kwargs=getattr(self, "generation_kwargs", None),
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )

    def _sample(
        self: Any, prompt_ids: Any, images: Any, multimodal_fields: Any
    ) -> Completions | None:
        """Completions of text prompts, or None where TRL has to sample."""
        reason = None
        if images is not None or multimodal_fields or self._is_vlm:
            reason = "multimodal prompts"
        elif getattr(self, "tools", None):
            reason = "tools or environments"
        if reason is not None:
            self.engine.fall_back(f"TRL's own rollout ran, from the trained model: {reason}")
            return None
        sampler = "vLLM" if self.use_vllm else "transformers"
        with profiling_context(self, f"{sampler}.generate"):
            return self.rollout.generate(prompt_ids)

    def _prepare_inputs(self: Any, generation_batch: Any) -> Any:
        rows = self.args.per_device_train_batch_size
        start = self.accelerator.process_index * rows * self.args.steps_per_generation
        with groups_kept_together(self._trl_module, self.num_generations, rows, start):
            return super()._prepare_inputs(generation_batch)

    def _record_mismatch(self: Any, rollout_logps: Tensor, logps: Tensor, mask: Tensor) -> None:
        metrics = self.mismatch.metrics(rollout_logps, logps, mask, self.accelerator.gather)
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _warn_of_other_reference(self: Any) -> None:
        """TRL loads the reference from where the policy came from, not from the policy."""
        if self.ref_model is None or self.is_fsdp_enabled:
            return
        policy = fingerprint(self.accelerator.unwrap_model(self.model).named_parameters())
        reference = fingerprint(self.accelerator.unwrap_model(self.ref_model).named_parameters())
        differing = [name for name, value in reference.items() if policy.get(name) != value]
        if differing:
            warn(
                f"fastpost: the reference was loaded from '{self.model.config._name_or_path}' and "
                f"differs from the policy given ({len(differing)} tensors, first '{differing[0]}'):"
                " the KL term pulls towards that folder's weights. Save the policy and pass its "
                "path to make it the reference",
                FastpostWarning,
                stacklevel=2,
            )


__all__ = ["GroupTrainer", "as_group_config", "refuse_before_loading"]
