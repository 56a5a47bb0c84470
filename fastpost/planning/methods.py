"""The loss of each method on a traced batch, computed as its trainer computes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastpost.head import is_plain_head
from fastpost.planning.ledger import REFERENCE
from fastpost.planning.request import Request
from fastpost.planning.subject import TracedEngine, make_reference
from fastpost.planning.tracer import Tracer
from fastpost.preference_scoring import KeptRows, PairScorer

__all__ = ["Objective", "make_objective"]

Objective = Callable[[dict[str, Tensor]], Tensor]


def make_objective(
    request: Request, config: Any, model: Any, engine: TracedEngine, tracer: Tracer
) -> Objective:
    """The loss of `request.method` as a function of a batch.

    The reference of DPO and GRPO is the policy with its adapter off where there is one, otherwise a
    frozen second model.
    """
    if request.method == "sft":
        return lambda batch: _supervised(model, batch)
    reference = model
    if request.adapter is None and request.method == "dpo":
        reference, _ = make_reference(request, config, tracer, REFERENCE)
    if request.method == "dpo":
        return lambda batch: _preference(model, reference, engine, batch)
    return lambda batch: _surrogate(model, batch)


def _supervised(model: Any, batch: dict[str, Tensor]) -> Tensor:
    count = (batch["labels"][:, 1:] != -100).sum()
    return model(**batch, num_items_in_batch=count).loss


def _preference(
    model: Any, reference: Any, engine: TracedEngine, batch: dict[str, Tensor]
) -> Tensor:
    """`trainers.dpo`: the reference first, then the policy against its rows or sums."""
    kept = KeptRows(engine.head)
    waits = reference is model and is_plain_head(engine.model)
    off = model.disable_adapter() if reference is model else nullcontext()
    was_training = model.training
    with torch.no_grad(), off, engine.scored_by(kept) if waits else nullcontext():
        reference.eval()
        scored = reference(**batch, fused_lm_head=True)
    model.train(was_training)
    sums = scored.log_probs.sum(1)
    pairs = PairScorer(engine.head, sums if kept.rows is None else kept.rows)
    with engine.scored_by(pairs):
        model(**batch, fused_lm_head=True)
    return -functional.logsigmoid(0.1 * pairs.scores.margins).mean()


def _surrogate(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """`trainers.grpo` with beta 0: the clipped surrogate of tokens, old log-probs kept beside."""
    log_probs = model(**batch, fused_lm_head=True).log_probs
    ratio = torch.exp(log_probs - log_probs.detach())
    clipped = ratio.clamp(0.8, 1.2)
    advantages = torch.ones(len(log_probs), 1)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()
