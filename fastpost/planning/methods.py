"""The loss of each method on a traced batch, computed as its trainer computes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
_BETA = 0.1


def make_objective(
    request: Request,
    config: Any,
    model: Any,
    engine: TracedEngine,
    tracer: Tracer,
    on_gpu: bool = True,
) -> Objective:
    """The loss of `request.method` as a function of a batch.

    The reference is the policy with its adapter off where there is one, otherwise a frozen second
    model of the same dtype.
    """
    reference = None
    if request.has_reference:
        reference = model
        if request.adapter is None:
            reference, _ = make_reference(request, config, tracer, REFERENCE, on_gpu)
    if request.method == "sft":
        return partial(_supervised, model)
    if request.method == "dpo":
        is_sharded = request.num_gpus > 1
        return lambda batch: _preference(model, reference, engine, is_sharded, batch)
    if request.method == "kto":
        return partial(_unpaired, model, reference)
    if request.method == "reward":
        return partial(_rewards, model)
    if request.samples:
        return partial(_surrogate, model, reference, request.method == "rloo")
    return partial(_reference_free, model, request.method)


def _scored(model: Any, batch: dict[str, Tensor]) -> Any:
    return model(**batch, use_cache=False, fused_lm_head=True)


def _referred(model: Any, reference: Any, batch: dict[str, Tensor]) -> Any:
    """What the reference says of a batch: the policy with its adapter off, or a second model."""
    off = model.disable_adapter() if reference is model else nullcontext()
    was_training = model.training
    with torch.no_grad(), off:
        reference.eval()
        found = _scored(reference, batch)
    model.train(was_training)
    return found


def _supervised(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found = _scored(model, batch)
    return -found.log_probs.sum() / found.label_mask.sum()


def _preference(
    model: Any, reference: Any, engine: TracedEngine, is_sharded: bool, batch: dict[str, Tensor]
) -> Tensor:
    """`trainers.dpo`: the reference first, then the policy against its rows or sums."""
    kept = KeptRows(engine.head)
    waits = reference is model and not is_sharded and is_plain_head(engine.model)
    with engine.scored_by(kept) if waits else nullcontext():
        sums = _referred(model, reference, batch).log_probs.sum(1)
    pairs = PairScorer(engine.head, sums if kept.rows is None else kept.rows)
    del sums, kept
    with engine.scored_by(pairs):
        _scored(model, batch)
    return -functional.logsigmoid(_BETA * pairs.scores.margins).mean()


def _unpaired(model: Any, reference: Any, batch: dict[str, Tensor]) -> Tensor:
    """`trl.KTOTrainer`: rows with their own answer, and with that of their neighbour for the KL."""
    is_prompt = batch["labels"] == -100
    mixed = {name: tensor.clone() for name, tensor in batch.items()}
    for name in ("input_ids", "labels"):
        mixed[name] = torch.where(is_prompt, batch[name], batch[name].roll(1, 0))
    with torch.no_grad():
        kl = _scored(model, mixed).log_probs.sum(1)
    found = _scored(model, batch)
    kl = (kl - _referred(model, reference, mixed).log_probs.sum(1)).mean().clamp(min=0)
    ratios = found.log_probs.sum(1) - _referred(model, reference, batch).log_probs.sum(1)
    return (1 - torch.sigmoid(_BETA * (ratios - kl))).mean()


def _reference_free(model: Any, method: str, batch: dict[str, Tensor]) -> Tensor:
    """`trainers.reference_free`: log-odds of ORPO, sums of CPO, means of SimPO."""
    labels = batch["labels"]
    pairs = len(labels) // 2
    is_answer = (labels != -100)[:, 1:]
    if method == "orpo":
        labels = torch.cat([batch["input_ids"][:pairs], labels[pairs:]])
    found = _scored(model, batch | {"labels": labels})
    sums = (found.log_probs * is_answer).sum(1)
    means = sums / is_answer.sum(1)
    nll = -found.log_probs[:pairs].sum() / (labels[:pairs, 1:] != -100).sum()
    if method == "simpo":
        chosen, rejected = means.chunk(2)
        return -functional.logsigmoid(_BETA * (chosen - rejected)).mean()
    if method == "cpo":
        chosen, rejected = sums.chunk(2)
        return nll - functional.logsigmoid(_BETA * (chosen - rejected)).mean()
    chosen, rejected = (means - torch.log1p(-torch.exp(means))).chunk(2)
    return nll - _BETA * functional.logsigmoid(chosen - rejected).mean()


def _rewards(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """`trl.RewardTrainer`: one number at the end of each row."""
    rows = {name: batch[name] for name in ("input_ids", "attention_mask")}
    chosen, rejected = model(**rows, use_cache=False).logits.squeeze(-1).float().chunk(2)
    return -functional.logsigmoid(chosen - rejected).mean()


def _surrogate(model: Any, reference: Any, is_rloo: bool, batch: dict[str, Tensor]) -> Tensor:
    """The clipped surrogate: of tokens with a KL (`trl.GRPOTrainer`), of rows with the log-probs
    from before the step (`trl.RLOOTrainer`, whose KL is in the rewards)."""
    num_answer = int((batch["labels"][0] != -100).sum())
    ref = old = None
    if is_rloo:
        with torch.no_grad():
            old = _scored(model, batch).log_probs[:, -num_answer:].sum(1)
    if reference is not None:
        ref = _referred(model, reference, batch).log_probs[:, -num_answer:]
    log_probs = _scored(model, batch).log_probs[:, -num_answer:]
    advantages = torch.ones(len(log_probs))
    if old is not None:
        ratio = torch.exp(log_probs.sum(1) - old)
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    ratio = torch.exp(log_probs - log_probs.detach())
    loss = -torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    if ref is not None:
        loss = loss + _BETA * (torch.exp(ref - log_probs) - (ref - log_probs) - 1)
    return loss.mean()
