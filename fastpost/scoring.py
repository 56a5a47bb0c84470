"""The forward of a causal language model at the seam where every method meets.

    pack ─► backbone on unique tokens ─► hidden states that are scored ─► linear_logprob

`accelerate_model(model)` gives the model a forward that takes two more kinds of call; every other
call (`generate`, evaluation with logits, hidden states, cached keys) reaches the model's own
forward, unchanged:

- `model(..., labels=labels, fused_lm_head=True)` returns per-token log-probs of the labels instead
  of logits. TRL's trainers call their models so.
- `model(..., labels=labels)` in training returns the loss without building logits, which is what
  `transformers.Trainer` reads.

What cannot be packed exactly runs the model's own backbone on the padded batch and still scores
through the kernel; what cannot be scored runs the model's own forward. Both are counted with the
reason, warned of once, and listed by `Engine.report()`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastpost.backbone import FastpostWarning, PackedBackbone, foreign_argument
from fastpost.head import Head, unscorable_reason
from fastpost.scored_output import ScoredOutput
from fastpost.self_check import compare_head, compare_packed

IGNORE_INDEX = -100
HEAD_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
OPTIONAL_OUTPUTS = (*HEAD_OUTPUTS, "state_values")


def accelerate_model(
    model: nn.Module,
    *,
    prefix_sharing: bool = True,
    memory_budget_gb: float | None = None,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> Engine:
    """Give a causal language model the packed, prefix-shared, logit-free forward.

    Args:
        model: a transformers causal language model, or one wrapped by PEFT.
        prefix_sharing: compute equal beginnings of rows once. False still removes padding.
        memory_budget_gb: workspace of the head in GiB; None takes the kernel's default.
        temperature: logits are divided by it.
        cast_lm_head_to_fp32: multiply by the head in fp32, outside autocast.
        outputs: fields of `ScoredOutput` to compute beside `log_probs`. "state_values" asks
            `model.value_head`, a linear layer of one output, about each scored hidden state.

    Returns:
        The `Engine`: `report()`, `stats`, and `remove()`, which restores the model exactly.

    Raises:
        TypeError: not a transformers model with an output embedding.
        ValueError: unknown output name, "state_values" without a value head, non-positive
            temperature or budget, or the model's own logits differ from what the head computes.
    """
    base: Any = model
    if hasattr(model, "get_base_model"):  # PEFT
        base = model.get_base_model()  # type: ignore[operator]
    if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None:
        raise TypeError(
            "accelerate_model needs a transformers causal language model (or one wrapped by "
            f"PEFT), got {type(model).__name__}"
        )
    unknown = set(outputs) - {"log_probs", *OPTIONAL_OUTPUTS}
    if unknown:
        raise ValueError(
            f"unknown outputs {sorted(unknown)}; choose from log_probs, "
            f"{', '.join(OPTIONAL_OUTPUTS)}"
        )
    if "state_values" in outputs and not isinstance(getattr(base, "value_head", None), nn.Module):
        raise ValueError(
            f"outputs has 'values' but {type(base).__name__} has no value_head; set "
            "model.value_head = torch.nn.Linear(hidden_size, 1) first"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if memory_budget_gb is not None and not memory_budget_gb > 0:
        raise ValueError(f"memory_budget_gb must be positive, got {memory_budget_gb}")
    budget = None if memory_budget_gb is None else int(memory_budget_gb * 2**30)
    head = Head.of(base, temperature, cast_lm_head_to_fp32, budget)
    return Engine(base, head, prefix_sharing, tuple(o for o in outputs if o != "log_probs"))


class DistinctRows(NamedTuple):
    """What a batch asks of the head: each distinct (context, target) once.

    Attributes:
        hidden: `[U, H]`.
        targets: `[U]`.
        places: `[M]`, the row at each scored place in row-major order; None: place i is row i.
        seq_lens: `[B]`, how many places each sequence of the batch has.
    """

    hidden: Tensor
    targets: Tensor
    places: Tensor | None
    seq_lens: Tensor


# Scores rows in place of `Head.score`: (model, rows, outputs) to per-row results like its.
RowScorer = Callable[[PreTrainedModel, DistinctRows, tuple[str, ...]], Any]


class Engine(PackedBackbone):
    """The installed forward of a causal language model (attributes in `PackedBackbone`)."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        prefix_sharing: bool,
        outputs: tuple[str, ...],
    ) -> None:
        self.head = head
        self.outputs = outputs
        self._head_outputs = tuple(name for name in outputs if name in HEAD_OUTPUTS)
        self._row_scorer: RowScorer = self._score_rows
        super().__init__(model, prefix_sharing)

    @contextmanager
    def scored_by(self, scorer: RowScorer) -> Iterator[None]:
        """Within, calls with `fused_lm_head=True` hand their rows to `scorer`."""
        before, self._row_scorer = self._row_scorer, scorer
        try:
            yield
        finally:
            self._row_scorer = before

    def score(
        self,
        model: PreTrainedModel,
        arguments: dict[str, Any],
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: Tensor | float | None,
    ) -> ScoredOutput:
        """Per-token log-probs of the labels: the call with `fused_lm_head=True`."""
        reason = unscorable_reason(model)
        if reason is not None:
            raise ValueError(f"log-probs cannot be computed without logits: {reason}")
        targets, scored = _targets(arguments, labels, shift_labels)
        hidden, index, output = self.run_backbone(model, arguments, scored)
        aux_loss, aux_coefficient = _load_balancing_loss(model, arguments, output)
        mask = scored if shift_labels is not None else scored[:, :-1]
        result = self._score_unique(model, hidden, index, targets[mask], mask.sum(1))

        def place(values: Tensor) -> Tensor:
            # `masked_scatter` keeps a batch without labels connected to the model.
            return values.new_zeros(mask.shape).masked_scatter(mask.to(values.device), values)

        log_probs = place(result.logprob)
        optional = {name: place(getattr(result, name)) for name in self._head_outputs}
        if "state_values" in self.outputs:
            optional["state_values"] = place(_values(model, hidden[index]))
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -log_probs.sum() / count
        if aux_loss is not None:
            loss = loss + aux_coefficient * aux_loss
        return ScoredOutput(
            loss=loss,
            log_probs=log_probs,
            label_mask=mask,
            aux_loss=aux_loss,
            **optional,
        )

    def _score_unique(
        self,
        model: PreTrainedModel,
        hidden: Tensor,
        index: Tensor,
        targets: Tensor,
        seq_lens: Tensor,
    ) -> Any:
        """Score each distinct (context, target) once: rows may share scored tokens as well."""
        vocab = model.get_output_embeddings().weight.shape[0]
        if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
            raise ValueError(
                f"labels must be -100 or in [0, {vocab}), got values from {int(targets.min())} "
                f"to {int(targets.max())}; the tokenizer has more tokens than the model's head"
            )
        keys, inverse = torch.unique(index * vocab + targets, return_inverse=True)
        if keys.numel() == targets.numel():
            rows = DistinctRows(hidden[index], targets, None, seq_lens)
            return self._row_scorer(model, rows, self._head_outputs)
        rows = DistinctRows(
            hidden[torch.div(keys, vocab, rounding_mode="floor")], keys % vocab, inverse, seq_lens
        )
        result = self._row_scorer(model, rows, self._head_outputs)
        return result._replace(
            **{
                name: None if values is None else values[inverse]
                for name, values in result._asdict().items()
            }
        )

    def _score_rows(
        self, model: PreTrainedModel, rows: DistinctRows, outputs: tuple[str, ...]
    ) -> Any:
        return self.head.score(model, rows.hidden, rows.targets, outputs)

    def train_loss(
        self,
        model: PreTrainedModel,
        arguments: dict[str, Any],
        labels: Tensor,
        num_items_in_batch: Tensor | float | None,
    ) -> CausalLMOutputWithPast:
        """Loss of a training call with labels, as the model's own forward computes it."""
        targets, scored = _targets(arguments, labels, None)
        hidden, index, output = self.run_backbone(model, arguments, scored)
        result = self.head.cross_entropy(
            model, hidden[index], targets[scored[:, :-1]], num_items_in_batch
        )
        loss = result.loss
        aux_loss, aux_coefficient = _load_balancing_loss(model, arguments, output)
        if aux_loss is not None:
            loss = loss + aux_coefficient * aux_loss
        return CausalLMOutputWithPast(loss=loss)

    def _run_self_check(self) -> str:
        if any(p.is_meta for p in self.model.parameters()):
            return "not run, the weights are not loaded on this process"
        if unscorable_reason(self.model) is not None:
            return f"not run, {unscorable_reason(self.model)}"
        with self.in_evaluation():
            found = [compare_head(self.model, self.head, self._original_forward)]
            if self.unpackable_reason is None:
                refusal, difference = compare_packed(self.model, self.run_backbone)
                found.append(difference)
                if refusal is not None:
                    self.unpackable_reason = refusal
                    self.fall_back(f"packing refused: {refusal}")
            head = self.model.get_output_embeddings()
            if isinstance(self.model, FSDPModule):
                # Last norm and head may be one unit, which is given back once both have run.
                hidden = torch.zeros(1, head.in_features, dtype=head.weight.dtype)
                head(hidden.to(head.weight.device))
        self.packed_forwards = 0
        return ", ".join(found)

    def _make_forward(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        return _make_forward(self, stock)


def _make_forward(engine: Engine, stock: Callable[..., Any]) -> Callable[..., Any]:
    positional = list(inspect.signature(stock).parameters)[1:]

    # `wraps` keeps the signature: generate and Trainer read the accepted arguments from it.
    @functools.wraps(stock)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Any:
        # PEFT passes every argument it knows, most of them None.
        given = {**dict(zip(positional, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        if _asks_for_router_logits(self):
            given.setdefault("output_router_logits", True)
        if fused_lm_head:
            return engine.score(self, given, labels, shift_labels, num_items_in_batch)
        trains = self.training and torch.is_grad_enabled() and engine.is_installed
        if trains and labels is not None and shift_labels is None:
            reason = unscorable_reason(self) or foreign_argument(given)
            if reason is None:
                return engine.train_loss(self, given, labels, num_items_in_batch)
            engine.fall_back(f"the model's own forward ran: {reason}")
        for name, value in (
            ("labels", labels),
            ("shift_labels", shift_labels),
            ("num_items_in_batch", num_items_in_batch),
        ):
            if value is not None:
                kwargs[name] = value
        return engine.stock_forward(self)(*args, **kwargs)

    return forward


def _asks_for_router_logits(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def _targets(
    arguments: dict[str, Any], labels: Tensor | None, shift_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Targets `[B, T-1]` or `[B, T]`, and the places `[B, T]` whose prediction is scored."""
    given = labels if shift_labels is None else shift_labels
    if given is None:
        raise ValueError("fused_lm_head=True scores labels: pass labels or shift_labels")
    ids = arguments.get("input_ids", arguments.get("inputs_embeds"))
    if ids is not None and (given.ndim != 2 or given.shape != ids.shape[:2]):
        raise ValueError(
            f"labels must have the shape [batch, tokens] of the input {tuple(ids.shape[:2])}, "
            f"got {tuple(given.shape)}"
        )
    if given.numel() == 0:
        raise ValueError(f"the batch is empty: labels have shape {tuple(given.shape)}")
    if shift_labels is not None:
        return shift_labels, shift_labels != IGNORE_INDEX
    scored = torch.zeros_like(given, dtype=torch.bool)
    scored[:, :-1] = given[:, 1:] != IGNORE_INDEX
    return given[:, 1:], scored


def _values(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The value head `[M]` fp32 on hidden states `[M, H]`."""
    head: Any = model.value_head
    weight = next(head.parameters())
    return head(hidden.to(weight.device, weight.dtype))[:, 0].float()


def _load_balancing_loss(
    model: PreTrainedModel, arguments: dict[str, Any], output: Any
) -> tuple[Tensor | None, float]:
    """Load-balancing loss of a mixture of experts over the batch's tokens, and its weight."""
    if not arguments.get("output_router_logits"):
        return None, 0.0
    # Every family of experts takes Mixtral's function through transformers' modular system.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss = load_balancing_loss_func(
        output.router_logits,
        config.num_experts,
        config.num_experts_per_tok,
        arguments.get("attention_mask"),
    )
    return loss, float(getattr(config, "router_aux_loss_coef", 0.0))


__all__ = ["DistinctRows", "Engine", "FastpostWarning", "accelerate_model"]
