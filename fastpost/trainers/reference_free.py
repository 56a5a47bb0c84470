"""What ORPO and CPO share: both answers of each pair scored in one forward, without a reference.

    chosen and rejected rows [2P, T] ─► model(..., fused_lm_head=True) ─► log-probs ─► `PairScores`

TRL runs the same rows through the model's own forward and reads its logits `[2P, T, V]`; here the
rows of a pair share their prompt and no logits are built.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpost.guards.columns import column_names, require_columns, require_rows
from fastpost.scoring import IGNORE_INDEX, accelerate_model
from fastpost.trainers.engine_config import refuse_unsupported
from fastpost.trainers.engine_trainer import EngineTrainer


class PairScores(NamedTuple):
    """What a loss needs of P pairs; the first P rows are the chosen ones.

    Attributes:
        sum_logps: `[2P]` fp32, log-prob of each answer; 0 for an empty one.
        mean_logps: `[2P]` fp32, the same per token of the answer; 0 for an empty one.
        chosen_nll: `[]`, negative log-likelihood per scored token of the chosen rows.
        chosen_logit: `[]`, mean logit over the vocabulary and the chosen answers' tokens, detached.
        rejected_logit: `[]`, the same of the rejected answers.
        aux_loss: load-balancing loss of a mixture of experts, unweighted, if asked for.
    """

    sum_logps: Tensor
    mean_logps: Tensor
    chosen_nll: Tensor
    chosen_logit: Tensor
    rejected_logit: Tensor
    aux_loss: Tensor | None


class ReferenceFreeTrainer(EngineTrainer):
    """Mixed in before TRL's trainer of one method."""

    model: Any
    accelerator: Any
    aux_loss_enabled: bool
    concatenated_inputs: Any

    def _install_engine(self, args: Any) -> None:
        """Give the trainer's model our forward. TRL installs none of its own here."""
        engine = accelerate_model(
            self.model,
            prefix_sharing=args.prefix_sharing,
            memory_budget_gb=args.memory_budget_gb,
            outputs=("log_probs", "mean_logits"),
        )
        self._take_engines([engine])

    def _score_pairs(
        self,
        model: Any,
        batch: dict[str, Any],
        padding_value: int,
        *,
        score_chosen_prompts: bool,
    ) -> PairScores:
        """Score a batch of TRL's `DPODataCollatorWithPadding`.

        Args:
            model: the model as the trainer was given it, wrapped or not.
            batch: `{chosen,rejected}_{input_ids,attention_mask,labels}`, `[P, T]` each.
            padding_value: token that fills the shorter side.
            score_chosen_prompts: take the prompts of chosen rows into `chosen_nll`.
        """
        rows = self.concatenated_inputs(
            batch, padding_value=padding_value, device=self.accelerator.device
        )
        ids, attended = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
        labels = rows["concatenated_labels"]
        pairs = labels.shape[0] // 2
        is_answer = (labels != IGNORE_INDEX)[:, 1:]
        if score_chosen_prompts:
            chosen = torch.where(attended[:pairs] == 1, ids[:pairs], IGNORE_INDEX)
            labels = torch.cat([chosen, labels[pairs:]])
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        output = model(
            input_ids=ids,
            attention_mask=attended,
            use_cache=False,
            labels=labels,
            fused_lm_head=True,
            **options,
        )
        num_scored = (labels[:pairs, 1:] != IGNORE_INDEX).sum()
        sum_logps = (output.log_probs * is_answer).sum(-1)
        logits = output.mean_logits.detach() * is_answer
        lengths = is_answer.sum(-1)
        return PairScores(
            sum_logps=sum_logps,
            mean_logps=sum_logps / lengths.clamp(min=1),
            chosen_nll=-output.log_probs[:pairs].sum() / num_scored.clamp(min=1),
            chosen_logit=logits[:pairs].sum() / lengths[:pairs].sum().clamp(min=1),
            rejected_logit=logits[pairs:].sum() / lengths[pairs:].sum().clamp(min=1),
            aux_loss=output.aux_loss,
        )


def check_arguments(
    method: str, model: Any, args: Any, train_dataset: Any, model_init: Any
) -> None:
    """Refuse what cannot be trained, before TRL loads or tokenises anything.

    Raises:
        ValueError: an encoder-decoder model, a model that is made later, or data that lacks columns
            or rows.
    """
    refuse_unsupported(args)
    if model is None or model_init is not None:
        raise ValueError(
            f"{method} needs the model itself: pass model=..., got "
            f"model={type(model).__name__} and model_init={model_init!r}. A model that model_init "
            "makes when training starts would not have the engine's forward"
        )
    config = getattr(model, "config", None)
    if args.is_encoder_decoder or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{method} trains decoder-only models, got an encoder-decoder "
            f"({type(model).__name__}); use a causal language model, or TRL's own trainer"
        )
    if train_dataset is not None:
        require_rows(train_dataset, "train_dataset")
        require_columns(column_names(train_dataset), [["chosen", "rejected"]], method)


__all__ = ["PairScores", "ReferenceFreeTrainer", "check_arguments"]
