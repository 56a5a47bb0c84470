"""The forward of reward and value models: one number per row, or one per chosen token.

    pack ─► backbone on unique tokens ─► hidden states of the asked places ─► score

`accelerate_pooled(model)` serves `*ForSequenceClassification` and `*ForTokenClassification` models
of transformers' decoders. Two kinds of call take the packed, prefix-shared path, in training and
under `no_grad` alike:

- `model(input_ids=, attention_mask=)` of a sequence classifier: pooled logits `[B, num_labels]` as
  the model's own, at the rightmost token whose id is not the padding id. That is the token
  *before* the end-of-sequence token where padding and end of sequence are one id.
- `model(input_ids=, attention_mask=, value_mask=)` of either: logits `[B, T, num_labels]` at the
  marked places, 0 elsewhere. Value models and process reward models ask this way.

Tokens behind the last asked place influence nothing and are not computed. Every other call reaches
the model's own forward; a batch that cannot be packed runs the model's own backbone on the padded
batch. Both are counted with the reason, warned of once, and listed by `report()`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput

from fastpost.backbone import PackedBackbone, foreign_argument
from fastpost.self_check import compare_packed

_SUFFIXES = ("ForSequenceClassification", "ForTokenClassification")
# Largest difference of a logit from the model's own, relative to logits beyond 1.
_LOGIT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOGIT_TOLERANCE_HALF = 0.1


def accelerate_pooled(model: nn.Module, *, prefix_sharing: bool = True) -> PooledEngine:
    """Give a reward or value model the packed, prefix-shared forward.

    Args:
        model: a transformers sequence or token classifier, or one wrapped by PEFT.
        prefix_sharing: compute equal beginnings of rows once. False still removes padding.

    Returns:
        The `PooledEngine`: `report()`, `stats`, and `remove()`, which restores the model exactly.

    Raises:
        TypeError: not a transformers model with a classification head.
        ValueError: the model's own logits differ from `score` on its hidden states.
    """
    base: Any = model
    if hasattr(model, "get_base_model"):  # PEFT
        base = model.get_base_model()  # type: ignore[operator]
    names = [cls.__name__ for cls in type(base).__mro__]
    if not isinstance(base, PreTrainedModel) or not any(n.endswith(_SUFFIXES) for n in names):
        raise TypeError(
            "accelerate_pooled needs a transformers *ForSequenceClassification or "
            f"*ForTokenClassification model (or one wrapped by PEFT), got {type(base).__name__}; "
            "causal language models take accelerate_model"
        )
    return PooledEngine(base, prefix_sharing)


class PooledEngine(PackedBackbone):
    """The installed forward of a reward or value model (attributes in `PackedBackbone`).

    Attributes:
        unpoolable_reason: why the model's own forward runs every call, None if it need not.
    """

    def __init__(self, model: PreTrainedModel, prefix_sharing: bool) -> None:
        self.unpoolable_reason: str | None = None
        if not isinstance(model, GenericForSequenceClassification | GenericForTokenClassification):
            # Encoders see both sides of a token; a few decoders pool by rules of their own.
            self.unpoolable_reason = (
                f"{type(model).__name__} has a forward of its own instead of transformers' generic "
                "pooled one"
            )
        super().__init__(model, prefix_sharing)

    def pooled_logits(self, model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor:
        """Logits `[B, num_labels]` at the pooled place of each row."""
        scored = torch.zeros_like(arguments["input_ids"], dtype=torch.bool)
        scored.scatter_(1, pooled_places(model, arguments["input_ids"])[:, None], True)
        return self._logits(model, arguments, scored)

    def token_logits(
        self, model: PreTrainedModel, arguments: dict[str, Any], value_mask: Tensor
    ) -> Tensor:
        """Logits `[B, T, num_labels]` at the places `value_mask` `[B, T]` marks, 0 elsewhere."""
        logits = self._logits(model, arguments, value_mask)
        # `masked_scatter` keeps a batch without marks connected to the model.
        zeros = logits.new_zeros(*value_mask.shape, logits.shape[-1])
        return zeros.masked_scatter(value_mask[..., None].to(logits.device), logits)

    def _logits(self, model: PreTrainedModel, arguments: dict[str, Any], scored: Tensor) -> Tensor:
        """The head's logits `[M, num_labels]` at the scored places, in row-major order."""
        hidden, index, _ = self.run_backbone(model, arguments, scored)
        head: Any = model
        hidden = hidden[index]
        if isinstance(model, GenericForTokenClassification):
            hidden = head.dropout(hidden)
        return head.score(hidden)

    def _run_self_check(self) -> str:
        if self.unpoolable_reason is not None:
            return f"not run, {self.unpoolable_reason}"
        if any(p.is_meta for p in self.model.parameters()):
            return "not run, the weights are not loaded on this process"
        with self.in_evaluation():
            found = [self._compare_logits()]
            if self.unpackable_reason is None:
                refusal, difference = compare_packed(self.model, self.run_backbone)
                found.append(difference)
                if refusal is not None:
                    self.unpackable_reason = refusal
                    self.fall_back(f"packing refused: {refusal}")
        self.packed_forwards = 0
        return ", ".join(found)

    def _compare_logits(self) -> str:
        """Compare `score` on the backbone's hidden states with the model's own forward.

        Raises:
            ValueError: they differ, so the head is not what it was taken for.
        """
        model: Any = self.model
        weight = model.get_input_embeddings().weight
        # One row, because several need a padding id; none of its ids may be that.
        pad = _pad_token_id(model)
        ids = torch.tensor([i for i in range(17) if i != pad][:16], device=weight.device)
        ids = (ids % weight.shape[0])[None]
        expected = self._original_forward(input_ids=ids, use_cache=False).logits.double()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if isinstance(model, GenericForSequenceClassification):
            actual = model.score(hidden[:, int(pooled_places(model, ids))])
        else:
            actual = model.score(model.dropout(hidden))
        scale = max(1.0, float(expected.abs().max()))
        error = float((actual.double() - expected.to(actual.device)).abs().max()) / scale
        if not error <= _LOGIT_TOLERANCE.get(model.dtype, _LOGIT_TOLERANCE_HALF):
            raise ValueError(
                f"the head of {type(model).__name__} is not `score` on the hidden states: its "
                f"logits differ by {error:.3g} from the model's own. Train this model with the "
                "stock trainer and report the architecture"
            )
        return f"logits within {error:.1e} of the model's own"

    def _make_forward(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        return _make_forward(self, stock)


def pooled_places(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Where transformers reads each row's logit: `[B]` int64.

    The rightmost token of `input_ids` `[B, T]` whose id is not the padding id, the first place
    where there is none, and the last place where the config names no padding id.
    """
    pad = _pad_token_id(model)
    width = input_ids.shape[1]
    if pad is None:
        return torch.full_like(input_ids[:, 0], width - 1, dtype=torch.int64)
    places = torch.arange(width, device=input_ids.device)
    return (places * (input_ids != pad)).argmax(-1)


def _pad_token_id(model: PreTrainedModel) -> int | None:
    return model.config.get_text_config().pad_token_id


def _make_forward(engine: PooledEngine, stock: Callable[..., Any]) -> Callable[..., Any]:
    positional = list(inspect.signature(stock).parameters)[1:]

    # `wraps` keeps the signature: Trainer reads the accepted arguments from it.
    @functools.wraps(stock)
    def forward(
        self: PreTrainedModel, *args: Any, value_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        # PEFT passes every argument it knows, most of them None.
        given = {**dict(zip(positional, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        reason = engine.unpoolable_reason or _own_forward_reason(self, given)
        if value_mask is not None:
            _check_value_mask(engine, given, value_mask, reason)
            return TokenClassifierOutput(logits=engine.token_logits(self, given, value_mask))
        if reason is None and not isinstance(self, GenericForSequenceClassification):
            if not (self.training and torch.is_grad_enabled()):  # asked for, and no loss to scoring
                return engine.stock_forward(self)(*args, **kwargs)
            reason = "trained on logits of every token; value_mask= chooses places"
        if reason is None:
            reason = _unpooled_reason(self, given)
        if reason is None and engine.is_installed:
            return SequenceClassifierOutputWithPast(logits=engine.pooled_logits(self, given))
        if reason is not None and engine.is_installed:
            engine.fall_back(f"the model's own forward ran: {reason}")
        return engine.stock_forward(self)(*args, **kwargs)

    return forward


def _own_forward_reason(model: PreTrainedModel, given: dict[str, Any]) -> str | None:
    """Why the model's own forward has to run, None if it need not."""
    if given.get("use_cache") is True:
        return "use_cache=True asks for cached keys"
    if not model.config.return_dict:
        return "config.return_dict is False"
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(model.config, name):
            return f"config.{name} is True"
    return foreign_argument(given)


def _unpooled_reason(model: PreTrainedModel, given: dict[str, Any]) -> str | None:
    """Why this batch has no pooled places that could be packed, None if it has."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    pad = _pad_token_id(model)
    if pad is None and ids.shape[0] != 1:
        return "config.pad_token_id is None, rows have no end"
    if mask is not None:
        at_places = mask.gather(1, pooled_places(model, ids)[:, None].to(mask.device))
        if not bool(at_places.bool().all()):
            return (
                f"a row is pooled at a masked token: attention_mask is 0 where input_ids is not "
                f"the padding id {pad} of the config. Pad with that id, or set "
                "model.config.pad_token_id to the tokenizer's"
            )
    return None


def _check_value_mask(
    engine: PooledEngine, given: dict[str, Any], value_mask: Tensor, reason: str | None
) -> None:
    if reason is not None:
        raise ValueError(
            "value_mask asks for logits of packed rows, given input_ids, attention_mask and "
            f"position_ids; that cannot be done here: {reason}"
        )
    if not engine.is_installed:
        raise ValueError("value_mask was given, but the engine was removed from this model")
    if value_mask.dtype != torch.bool or value_mask.shape != given["input_ids"].shape:
        raise ValueError(
            f"value_mask must be bool of the shape of input_ids {tuple(given['input_ids'].shape)}, "
            f"got {value_mask.dtype} {tuple(value_mask.shape)}"
        )


__all__ = ["PooledEngine", "accelerate_pooled", "pooled_places"]
