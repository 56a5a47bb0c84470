"""Online direct preference optimisation (Guo 2024, arXiv 2402.04792; DPO: Rafailov 2023, eq. 7).

    two completions a prompt from the policy of now, the one with the higher reward is chosen:
    Δ = (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))
    sigmoid: −log σ(β Δ)        ipo: (Δ − 1/(2β))²

A drop-in for TRL's experimental `OnlineDPOTrainer`: same constructor, same configuration fields,
same rewards, same loss, same parameters after the same steps on the same completions. Beneath it
the two completions of a prompt share it, padding is never computed, and only completion tokens
reach the head. Data, one row, whose other columns reach the reward functions:

    {"prompt": [{"role": "user", "content": "2 + 2?"}], "solution": "4"}

Two things differ on purpose. With gradient accumulation the gradient is the mean over the micro-
batches; TRL's is their sum, `gradient_accumulation_steps` times as long. And `objective/kl`,
`objective/non_score_reward`, `objective/rlhf_reward` and `objective/entropy` are sums over
completion tokens; TRL's also sum what the models say of the padding behind a completion. The loss
never did.

With `rollout_dtype` completions come from a copy in that dtype; its distance is measured as in
`grpo`, at temperature 1, which is where this method scores. vLLM and images sample as TRL does.

Refused: DeepSpeed, vLLM that is not installed, `max_new_tokens` that leave no room for a prompt in
`max_length`, a reference that is the policy or shares its weights, a data set without prompts.
Checked: the reference's weights are the same at the end as at the beginning.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.data_utils import maybe_apply_chat_template
from trl.extras.profiling import profiling_context
from trl.import_utils import TRLExperimentalWarning
from trl.models import unwrap_model_for_generation

from fastpost.adapters.preset import preset_argument
from fastpost.guards.columns import column_names, require_columns, require_rows
from fastpost.guards.reference import refuse_shared_reference
from fastpost.references import (
    ReferenceConfig,
    check_reference,
    drop_reference_adapter,
    frozen_reference,
    has_adapter,
)
from fastpost.rollout.mismatch import MismatchMeter
from fastpost.rollout.rollout_config import RolloutConfig
from fastpost.rollout.transformers_rollout import TransformersRollout
from fastpost.rollout.vllm_rollout import require_vllm
from fastpost.scoring import IGNORE_INDEX, accelerate_model
from fastpost.trainers.engine_config import EngineConfig, as_config, refuse_unsupported
from fastpost.trainers.engine_trainer import EngineTrainer
from fastpost.trainers.reference_guard import ReferenceGuard

# TRL warns that what lies there may move. We are built and tested against one version of TRL.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental import online_dpo as trl_online_dpo


@dataclass
class OnlineDPOConfig(EngineConfig, ReferenceConfig, RolloutConfig, trl_online_dpo.OnlineDPOConfig):
    """TRL's `OnlineDPOConfig`, the fields of engine and rollout, and `reference`."""


class OnlineDPOTrainer(ReferenceGuard, EngineTrainer, trl_online_dpo.OnlineDPOTrainer):
    """TRL's `OnlineDPOTrainer` on the packed, prefix-shared, logit-free forward.

    Overrides `_forward` and `_generate`.

    Attributes:
        rollout: samples the completions of text prompts; None with vLLM.
        mismatch: how far sampling and learning model are apart; None where both are one.

    Raises:
        ImportError: `use_vllm` without vLLM.
        ValueError: see above.
        RuntimeError: in training, `rollout_mismatch_limit` is exceeded.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        reward_funcs: Any = None,
        args: OnlineDPOConfig | trl_online_dpo.OnlineDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = as_config(args, OnlineDPOConfig)
        kwargs |= preset_argument(args, kwargs)
        adapter = has_adapter(model, kwargs.get("peft_config"))
        check_reference(args, "online DPO", ("base", "frozen"), adapter, ref_model)
        _refuse_before_loading(args, train_dataset)
        refuse_shared_reference(model, ref_model)
        ref_model = frozen_reference(args, model, ref_model, adapter)
        super().__init__(
            model, ref_model, reward_funcs, args, data_collator, train_dataset, *rest, **kwargs
        )
        drop_reference_adapter(args, self.model)
        self._take_engines(
            [
                accelerate_model(
                    # Without accelerate's autocast around its forward: ours says when.
                    self.accelerator.unwrap_model(scored, keep_fp32_wrapper=False),
                    prefix_sharing=args.prefix_sharing,
                    memory_budget_gb=args.memory_budget_gb,
                )
                for scored in (self.model, self.ref_model)
                if scored is not None
            ]
        )
        self._guard_reference()
        needs_meter = args.rollout_dtype is not None or args.rollout_mismatch_limit is not None
        self.mismatch = MismatchMeter(args.rollout_mismatch_limit) if needs_meter else None
        self.rollout = None if args.use_vllm else self._make_rollout(needs_meter)
        self._rollout_logps: Tensor | None = None

    @property
    def beta(self) -> float:
        """β of this epoch. (TRL takes a list too, and fails when it indexes it.)"""
        if isinstance(self._beta, list):
            return self._beta[min(int(self.state.epoch), len(self._beta) - 1)]
        return self._beta

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # TRL's step calls this with the loss of one micro-batch, and nobody divides.
        backward, count = self.accelerator.backward, self.current_gradient_accumulation_steps
        self.accelerator.backward = lambda loss, **options: backward(loss / count, **options)
        try:
            return super().training_step(*args, **kwargs)
        finally:
            del self.accelerator.backward

    def _make_rollout(self, needs_logps: bool) -> TransformersRollout:
        if self.args.cache_implementation is not None:
            self.generation_config.cache_implementation = self.args.cache_implementation
        return TransformersRollout(
            lambda: unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, generation_kwargs=self.generation_kwargs
            ),
            self.generation_config,
            rollout_dtype=self.args.rollout_dtype,
            needs_logps=needs_logps,
            logps_temperature=1.0,
        )

    def _generate(self, model: Any, prompts: Any, images: Any = None) -> Any:
        self._rollout_logps = None
        if images is not None or self.is_vision_model:
            self.engine.fall_back("TRL's own rollout ran, from the trained model: images")
            return super()._generate(model, prompts, images)
        assert self.rollout is not None
        rows = [{"prompt": prompt} for prompt in prompts]
        texts = [maybe_apply_chat_template(row, self.processing_class)["prompt"] for row in rows]
        prompt_ids = self.processing_class(text=texts, add_special_tokens=False)["input_ids"] * 2
        with profiling_context(self, "transformers.generate"):
            sampled = self.rollout.generate(prompt_ids)
        pad, device = self._tokenizer.pad_token_id, self.accelerator.device
        completions = sampled.completion_ids
        if sampled.logps is not None:
            self._rollout_logps = _padded(sampled.logps, 0.0, device)
        ones = [[1] * len(ids) for ids in completions]
        return (
            _padded(prompt_ids, pad, device, left=True),
            _padded([[1] * len(ids) for ids in prompt_ids], 0, device, left=True),
            _padded(completions, pad, device),
            _padded(ones, 0, device),
            None,
        )

    def _forward(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        vision_inputs: Any = None,
    ) -> Tensor:
        """Log-probs `[2B, C]` of the completions, zero behind their end."""
        if vision_inputs is not None:
            self.engine.fall_back("the model's own forward ran: images")
            return super()._forward(
                model, prompt_ids, prompt_mask, completion_ids, completion_mask, vision_inputs
            )
        length = completion_ids.shape[1]
        cut = max(prompt_ids.shape[1] + length - self.max_length, 0)
        input_ids = torch.cat((prompt_ids[:, cut:], completion_ids), dim=1)
        attention_mask = torch.cat((prompt_mask[:, cut:], completion_mask), dim=1)
        labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
        labels[:, :-length] = IGNORE_INDEX
        with self.accelerator.autocast():
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                fused_lm_head=True,
            )
        logps = output.log_probs[:, -length:]
        if self.mismatch is not None and self._rollout_logps is not None:
            # The first forward after a rollout is the policy's.
            metrics = self.mismatch.metrics(
                self._rollout_logps, logps, completion_mask, self.accelerator.gather
            )
            for name, value in metrics.items():
                self.stats.setdefault(name, []).append(value)
            self._rollout_logps = None
        return logps


def _refuse_before_loading(args: Any, train_dataset: Any) -> None:
    """Refuse before anything is loaded what would fail later."""
    refuse_unsupported(args)
    if args.use_vllm:
        require_vllm()
        if args.rollout_dtype is not None or args.rollout_mismatch_limit is not None:
            raise ValueError(
                "rollout_dtype and rollout_mismatch_limit are about a transformers rollout, and "
                "TRL's vLLM rollout of this method reports no log-probs; set both to None"
            )
    if args.max_new_tokens >= args.max_length:
        raise ValueError(
            f"max_new_tokens ({args.max_new_tokens}) leaves no room for a prompt in max_length "
            f"({args.max_length}); raise max_length to the longest prompt plus max_new_tokens"
        )
    if train_dataset is not None:
        require_rows(train_dataset, "train_dataset")
        require_columns(column_names(train_dataset), [["prompt"]], "online DPO")


def _padded(rows: list[Any], fill: Any, device: torch.device, *, left: bool = False) -> Tensor:
    """Rows of different lengths as one tensor, filled up on the right or the left."""
    width = max(map(len, rows))
    gaps = [[fill] * (width - len(row)) for row in rows]
    filled = [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(filled, device=device)


__all__ = ["OnlineDPOConfig", "OnlineDPOTrainer"]
