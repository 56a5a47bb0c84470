"""TRL's own loss methods, run on given log-probs through a stand-in for the trainer."""

from __future__ import annotations

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read when trl.experimental is imported

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


def one_process() -> SimpleNamespace:
    """What the methods use of an accelerator, in a world of one process."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        parallelism_config=None,
        gather=lambda tensor: tensor,
        gather_for_metrics=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )


def stand_in(**fields: Any) -> SimpleNamespace:
    """A trainer reduced to the fields that its loss reads."""
    common = {
        "accelerator": one_process(),
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(common | fields))


def fused_outputs(logps: Tensor, mask: Tensor) -> SimpleNamespace:
    """What TRL's fused head returns, with given log-probs `[B, T]`, 0 where not scored."""
    zeros = torch.zeros_like(logps.detach())
    return SimpleNamespace(
        log_probs=logps * mask,
        label_mask=mask,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )


def with_prompt(mask: Tensor) -> Tensor:
    """`[B, T]` → `[B, T + 1]`: a prompt token in front, which the shift removes."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long()


@pytest.fixture
def trl_dpo() -> Callable[..., SimpleNamespace]:
    """`loss_type, logps [2P, T], ref_seq_logps [2P], mask [2P, T]` → loss and metrics."""
    from trl import DPOTrainer

    def run(
        loss_type: str, logps: Tensor, ref_seq_logps: Tensor, mask: Tensor, **fields: Any
    ) -> SimpleNamespace:
        defaults = {
            "loss_types": [loss_type],
            "loss_weights": [1.0],
            "beta": 0.1,
            "ld_alpha": None,
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "use_weighting": False,
            "precompute_ref_logps": True,
            "args": SimpleNamespace(discopop_tau=fields.pop("discopop_tau", 0.05)),
        }
        trainer = stand_in(**(defaults | fields))
        ref_chosen, ref_rejected = ref_seq_logps.chunk(2)
        completion_mask = with_prompt(mask)
        inputs = {
            "input_ids": torch.zeros_like(completion_mask),
            "attention_mask": torch.ones_like(completion_mask),
            "completion_mask": completion_mask,
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
        }
        loss = DPOTrainer._compute_loss(
            trainer, lambda **_: fused_outputs(logps, mask), inputs, False
        )
        return SimpleNamespace(loss=loss, metrics=trainer._metrics["train"])

    return run


@pytest.fixture
def trl_kto() -> Callable[..., SimpleNamespace]:
    """`loss_type, logps [B, T], ref_seq_logps [B], mask, labels [B], kl_logps, ref_kl_logps`."""
    from trl import KTOTrainer

    def run(
        loss_type: str,
        logps: Tensor,
        ref_seq_logps: Tensor,
        mask: Tensor,
        labels: Tensor,
        kl_seq_logps: Tensor,
        ref_kl_seq_logps: Tensor,
        **fields: Any,
    ) -> SimpleNamespace:
        trainer = stand_in(
            loss_type=loss_type,
            calculate_KL=loss_type == "kto",
            precompute_ref_logps=True,
            _compute_kl_logps=lambda model, batch: kl_seq_logps,
            **fields,
        )
        completion_mask = with_prompt(mask)
        inputs = {
            "input_ids": torch.zeros_like(completion_mask),
            "attention_mask": torch.ones_like(completion_mask),
            "completion_mask": completion_mask,
            "label": labels,
            "ref_logps": ref_seq_logps,
            "ref_KL_logps": ref_kl_seq_logps,
        }
        loss = KTOTrainer._compute_loss(
            trainer, lambda **_: fused_outputs(logps, mask), inputs, False
        )
        return SimpleNamespace(loss=loss, metrics=trainer._metrics["train"])

    return run


@pytest.fixture
def trl_sft() -> Callable[..., Tensor]:
    """`loss_type, logps [B, T], mask [B, T], num_items` → loss."""
    from trl import SFTTrainer

    def run(loss_type: str, logps: Tensor, mask: Tensor, num_items: int | None) -> Tensor:
        trainer = stand_in(
            compute_loss_func=None,
            label_smoother=None,
            args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
        )
        inputs = {"labels": None, "attention_mask": with_prompt(mask)}
        model = lambda **_: fused_outputs(logps, mask)  # noqa: E731
        loss: Tensor = SFTTrainer.compute_loss(trainer, model, inputs, num_items_in_batch=num_items)
        return loss

    return run


@pytest.fixture
def trl_reward() -> Callable[..., Tensor]:
    """`rewards [2P], margin [P] or None, coefficient` → loss."""
    from trl import RewardTrainer

    def run(rewards: Tensor, margin: Tensor | None, coefficient: float | None) -> Tensor:
        trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=coefficient))
        inputs = {"attention_mask": torch.ones(len(rewards), 1)}
        if margin is not None:
            inputs["margin"] = margin
        model = lambda **_: SimpleNamespace(logits=rewards.unsqueeze(1))  # noqa: E731
        loss: Tensor = RewardTrainer.compute_loss(trainer, model, inputs)
        return loss

    return run


def rollout_inputs(mask: Tensor, **fields: Any) -> dict[str, Any]:
    """What GRPO and RLOO read of a scored rollout."""
    return {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(mask, dtype=torch.int64),
        "completion_mask": mask.long(),
        **fields,
    }


@pytest.fixture
def trl_grpo() -> Callable[..., SimpleNamespace]:
    """`loss_type, level, logps, old_logps, ref_logps, advantages, mask` → loss and metrics."""
    from trl import GRPOTrainer

    def run(
        loss_type: str,
        level: str,
        logps: Tensor,
        old_logps: Tensor,
        ref_logps: Tensor,
        advantages: Tensor,
        mask: Tensor,
        num_items: int,
        **fields: Any,
    ) -> SimpleNamespace:
        trainer = stand_in(
            _get_per_token_logps_and_entropies=lambda *_, **__: (
                logps,
                torch.zeros_like(logps),
                None,
            ),
            loss_type=loss_type,
            importance_sampling_level=level,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            **fields,
        )
        inputs = rollout_inputs(
            mask,
            advantages=advantages,
            old_per_token_logps=old_logps,
            ref_per_token_logps=ref_logps,
            num_items_in_batch=torch.tensor(num_items),
        )
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
        return SimpleNamespace(loss=loss, metrics=trainer._metrics["train"])

    return run


@pytest.fixture
def trl_rloo() -> Callable[..., SimpleNamespace]:
    """`logps [B, T], old_seq_logps [B], advantages [B], mask [B, T]` → loss and metrics."""
    from trl import RLOOTrainer

    def run(
        logps: Tensor, old_seq_logps: Tensor, advantages: Tensor, mask: Tensor, **fields: Any
    ) -> SimpleNamespace:
        trainer = stand_in(
            _get_per_token_logps_and_entropies=lambda *_, **__: (
                logps,
                torch.zeros_like(logps),
                None,
            ),
            **fields,
        )
        inputs = rollout_inputs(mask, advantages=advantages, old_logps=old_seq_logps)
        loss = RLOOTrainer._compute_loss(trainer, None, inputs)
        return SimpleNamespace(loss=loss, metrics=trainer._metrics["train"])

    return run
