"""Group relative policy optimisation (Shao 2024, arXiv 2402.03300, eq. 3) and its relatives.

    A_i = (R_i − mean R) / std R  within the group of a prompt,   r_t = π(y_t)/π_old(y_t)
    loss = −mean_i mean_t min(r_t A_i, clip(r_t, 1 − ε, 1 + ε) A_i) + β KL(π ‖ π_ref)

A drop-in for `trl.GRPOTrainer`: same constructor, same configuration fields (every `loss_type`,
`importance_sampling_level="sequence"` for GSPO), same metrics, same parameters after the same
steps on the same completions. Beneath it the prompt of a group is computed once in the policy, the
old-policy and the reference pass; TRL's shuffle, which would tear groups apart, moves whole groups.
Data, one row, whose other columns reach the reward functions:

    {"prompt": [{"role": "user", "content": "2 + 2?"}], "solution": "4"}

With `rollout_dtype` completions come from a copy in that dtype, with `use_vllm` from vLLM; how far
that is from the trained model is logged (`rollout/kl`, `rollout/ess`, `rollout/p99_ratio`) and can
stop the run. Multimodal prompts, tools and environments sample as TRL does, and are counted.

Refused: DeepSpeed, vLLM that is not installed, a data set without prompts. Warned of: micro-batches
that split groups, a reference that is not the policy the run starts from. Checked: the reference's
weights are the same at the end as at the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trl
from trl.trainer import grpo_trainer as trl_grpo

from fastpost.adapters.preset import preset_argument
from fastpost.references import ReferenceConfig
from fastpost.rollout.rollout_config import RolloutConfig
from fastpost.trainers.engine_config import EngineConfig
from fastpost.trainers.group_trainer import (
    GroupTrainer,
    as_group_config,
    refuse_before_loading,
)
from fastpost.trainers.seam import engine_at_seam


@dataclass
class GRPOConfig(EngineConfig, ReferenceConfig, RolloutConfig, trl.GRPOConfig):
    """`trl.GRPOConfig`, the fields of engine and rollout, and `reference`."""


class GRPOTrainer(GroupTrainer, trl.GRPOTrainer):
    """`trl.GRPOTrainer` on the packed, prefix-shared, logit-free forward.

    Raises:
        ImportError: `use_vllm` without vLLM.
        ValueError: the data set lacks prompts or rows, or an option cannot be honoured.
        RuntimeError: in training, `rollout_mismatch_limit` is exceeded.
    """

    _trl_module = trl_grpo

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | trl.GRPOConfig | None = None,
        train_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = as_group_config(args, GRPOConfig)
        has_tools = bool(kwargs.get("tools") or kwargs.get("environment_factory"))
        kwargs |= preset_argument(args, kwargs)
        peft_config = kwargs.get("peft_config")
        refuse_before_loading(args, model, peft_config, train_dataset, "GRPO", has_tools)
        with engine_at_seam(trl_grpo, args) as engines:
            super().__init__(model, reward_funcs, args, train_dataset, *rest, **kwargs)
        self._set_up(engines)
        self._scored_logps: Any = None

    def _generate_single_turn(
        self,
        prompt_ids: Any,
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> Any:
        sampled = self._sample(prompt_ids, images, multimodal_fields)
        if sampled is None:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        return sampled.completion_ids, sampled.logps

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._scored_logps = result[0].detach()
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        loss = super()._compute_loss(model, inputs)
        rollout_logps = inputs.get("sampling_per_token_logps")
        if self.mismatch is not None and rollout_logps is not None:
            # TRL keeps no old log-probs where the policy has not moved since it sampled.
            logps = inputs.get("old_per_token_logps")
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            logps = self._scored_logps if logps is None else logps
            self._record_mismatch(rollout_logps, logps, mask)
        return loss


__all__ = ["GRPOConfig", "GRPOTrainer"]
