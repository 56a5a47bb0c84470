"""REINFORCE leave-one-out (Ahmadian 2024, arXiv 2402.14740, eq. 8) with a clipped ratio.

    A_i = R_i − mean_{j≠i} R_j,   R = reward − β Σ_t (log π_old(y_t) − log π_ref(y_t))
    loss = −mean_i min(r_i A_i, clip(r_i, 1 − ε, 1 + ε) A_i),   r_i = π(y_i)/π_old(y_i)

A drop-in for `trl.RLOOTrainer`: same constructor, same configuration fields, same metrics, same
parameters after the same steps on the same completions. Beneath it the prompt of a group is
computed once in the policy, the old-policy and the reference pass; TRL's shuffle, which would tear
groups apart, moves whole groups. Data, one row, whose other columns reach the reward functions:

    {"prompt": [{"role": "user", "content": "2 + 2?"}], "solution": "4"}

With `rollout_dtype` completions come from a copy in that dtype, with `use_vllm` from vLLM; how far
that is from the trained model is logged (`rollout/kl`, `rollout/ess`, `rollout/p99_ratio`) and can
stop the run.

Refused, warned of and checked: as in `grpo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer import rloo_trainer as trl_rloo

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
class RLOOConfig(EngineConfig, ReferenceConfig, RolloutConfig, trl.RLOOConfig):
    """`trl.RLOOConfig`, the fields of engine and rollout, and `reference`."""


class RLOOTrainer(GroupTrainer, trl.RLOOTrainer):
    """`trl.RLOOTrainer` on the packed, prefix-shared, logit-free forward.

    Raises:
        ImportError: `use_vllm` without vLLM.
        ValueError: the data set lacks prompts or rows, or an option cannot be honoured.
        RuntimeError: in training, `rollout_mismatch_limit` is exceeded.
    """

    _trl_module = trl_rloo

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: RLOOConfig | trl.RLOOConfig | None = None,
        train_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = as_group_config(args, RLOOConfig)
        kwargs |= preset_argument(args, kwargs)
        peft_config = kwargs.get("peft_config")
        refuse_before_loading(args, model, peft_config, train_dataset, "RLOO", has_tools=False)
        with engine_at_seam(trl_rloo, args) as engines:
            super().__init__(model, reward_funcs, args, train_dataset, *rest, **kwargs)
        if self.use_vllm:
            self.vllm_generation.logprobs = 0  # of the sampled token; TRL asks for none here
        self._set_up(engines)
        self._rollout_logps: list[list[float]] | None = None
        self._scored_logps: list[Tensor] = []

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> Any:
        sampled = self._sample(prompt_ids, images, multimodal_fields)
        if sampled is None:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        self._rollout_logps = sampled.logps
        return sampled.completion_ids

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._scored_logps.append(result[0].detach())
        return result

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._rollout_logps, self._scored_logps = None, []
        output = super()._generate_and_score_completions(inputs)
        if self.mismatch is not None and self._rollout_logps is not None:
            completion_ids = output["completion_ids"]
            # The first pass over a generation batch is the policy's.
            self._record_mismatch(
                _pad_right(self._rollout_logps, completion_ids),
                self._scored_logps[0],
                output["completion_mask"],
            )
        self._scored_logps = []
        return output


def _pad_right(logps: list[list[float]], completion_ids: Tensor) -> Tensor:
    """Log-probs of the completions in the layout `[B, C]` of their ids."""
    padded = torch.zeros(completion_ids.shape, device=completion_ids.device)
    for row, values in zip(padded, logps, strict=True):
        row[: len(values)] = torch.tensor(values)
    return padded


__all__ = ["RLOOConfig", "RLOOTrainer"]
