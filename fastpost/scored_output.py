"""What a scored forward returns, and what it counted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class ScoredOutput(ModelOutput):
    """What a call with `fused_lm_head=True` returns. Fields not asked for are None.

    It is a mapping too, so no field may have the name of a mapping's method.

    Per-token fields are `[B, T-1]` (`[B, T]` with `shift_labels`) and zero where a label is -100.

    Attributes:
        loss: mean negative log-prob of the scored tokens, or their sum over `num_items_in_batch`,
            plus the weighted load-balancing loss of a mixture of experts.
        log_probs: log-prob of each label.
        entropy: entropy of each next-token distribution.
        log_sum_sq_probs: `log Σ p²`, without gradient.
        mean_logits: mean logit over the vocabulary, without gradient.
        is_top1: whether the label is the most likely token.
        state_values: what the model's `value_head` says of the state that predicts each label.
        label_mask: True where a label is scored.
        aux_loss: load-balancing loss of a mixture of experts, unweighted.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    state_values: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class TokenStats:
    """Tokens of the training forwards so far.

    Attributes:
        padded_tokens: places in the batches as they came, padding included.
        row_tokens: tokens that are not padding.
        unique_tokens: tokens that went through the backbone.
        scored_tokens: predictions that were scored.
    """

    padded_tokens: int = 0
    row_tokens: int = 0
    unique_tokens: int = 0
    scored_tokens: int = 0


__all__ = ["ScoredOutput", "TokenStats"]
