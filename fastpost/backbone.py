"""The backbone of a model on packed, prefix-shared rows.

    pack ─► unique tokens through the backbone ─► hidden states, and where each row's stand

Whatever sits on the hidden states (a language-model head, a reward head, a value head) is the
business of the engines built on this: `scoring.Engine` and `pooling.PooledEngine`. What cannot be
packed exactly runs on the padded batch; that is counted with the reason, warned of once, and
listed by `report()`.
"""

from __future__ import annotations

import types
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpost import attention, layers
from fastpost.adapted_layers import unfused_adapters, ungrouped_projections
from fastpost.packing import PackPlan, UnpackableBatchError, pack
from fastpost.scored_output import TokenStats
from fastpost.sharding import reshard

# Arguments that describe the batch's layout; the plan replaces them.
_LAYOUT_ARGUMENTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
    }
)
# Arguments the packed forward may drop, at these values.
_NEUTRAL_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "use_cache": (True, False),
    "return_dict": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "logits_to_keep": (0,),
}


class FastpostWarning(UserWarning):
    """Something runs slower or otherwise than the user may expect; the message says why."""


class PackedBackbone(ABC):
    """A model's installed forward: what it replaced, what it fell back on, what it computed.

    An engine says what the forward does (`_make_forward`) and how it is proved at start
    (`_run_self_check`); its own attributes must be set before this constructor runs.

    Attributes:
        stats: tokens of the training forwards so far.
        fallbacks: reason -> times a call did not take the fast path.
        self_check: what the comparison with the model's own forward found at start.
    """

    def __init__(self, model: PreTrainedModel, prefix_sharing: bool) -> None:
        if model in _ENGINES:
            _ENGINES[model].remove()
        self.model = model
        self.prefix_sharing = prefix_sharing
        self.stats = TokenStats()
        self.fallbacks: Counter[str] = Counter()
        self.packed_forwards = 0
        self.is_installed = True
        self.unpackable_reason = attention.unsupported_reason(model)
        self._is_attached = self.unpackable_reason is None
        if self._is_attached:
            attention.attach(model)
        self.fused_layers = layers.attach(model)
        self._had_forward = "forward" in model.__dict__
        self._original_forward: Callable[..., Any] = model.forward
        self._forward = types.MethodType(self._make_forward(type(model).forward), model)
        model.forward = self._forward
        try:
            self.self_check = self._run_self_check()
        except Exception:
            self.remove()
            raise
        _ENGINES[model] = self

    @abstractmethod
    def _make_forward(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """The function installed as the model's forward; `stock` is the class's own."""

    @abstractmethod
    def _run_self_check(self) -> str:
        """Compare with the model's own forward.

        Raises:
            ValueError: they differ.
        """

    def remove(self) -> None:
        """Restore the model exactly as it was."""
        if not self.is_installed:
            return
        self.is_installed = False
        # Another library may have wrapped our forward since; then it passes calls through.
        if self.model.__dict__.get("forward") is self._forward:
            if self._had_forward:
                self.model.forward = self._original_forward
            else:
                del self.model.__dict__["forward"]
        if self.fused_layers:
            layers.detach(self.model)
        if self._is_attached:
            attention.detach(self.model)
        _ENGINES.pop(self.model, None)

    def stock_forward(self, model: PreTrainedModel) -> Callable[..., Any]:
        """The forward that ours replaced, bound to `model` (ours, or a deep copy of it)."""
        if self._had_forward:
            return self._original_forward
        return types.MethodType(type(model).forward, model)

    def report(self) -> str:
        """What was replaced, what the self-check found, every fallback with its count."""
        packing = "on" if self.unpackable_reason is None else f"off, {self.unpackable_reason}"
        lines = [
            f"fastpost on {type(self.model).__name__}"
            + ("" if self.is_installed else " (removed again)"),
            f"  packing {packing}; prefix sharing {'on' if self.prefix_sharing else 'off'}",
            f"  self-check: {self.self_check}",
            f"  packed forwards: {self.packed_forwards}; fused layers: {len(self.fused_layers)}",
        ]
        for reason, count in unfused_adapters(self.model).items():
            lines.append(f"  adapted layers on PEFT's own forward: {count}, {reason}")
        for reason, count in ungrouped_projections(self.model).items():
            lines.append(f"  projections that each read their input: {count} groups, {reason}")
        stats = self.stats
        if stats.padded_tokens:
            lines.append(
                f"  training tokens: {stats.padded_tokens:,} padded -> {stats.row_tokens:,} in "
                f"rows -> {stats.unique_tokens:,} computed -> {stats.scored_tokens:,} scored"
            )
        lines += [f"  fell back {count}x: {why}" for why, count in self.fallbacks.items()]
        return "\n".join(lines)

    def fall_back(self, reason: str) -> None:
        """Count a call that leaves the fast path; warn the first time."""
        if reason not in self.fallbacks:
            warn(f"fastpost: {reason}", FastpostWarning, stacklevel=2)
        self.fallbacks[reason] += 1

    def run_backbone(
        self, model: PreTrainedModel, arguments: dict[str, Any], scored: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Hidden states of the batch and where the scored ones stand among them.

        Args:
            model: the model whose forward was called (a deep copy of ours calls with itself).
            arguments: keyword arguments of the backbone.
            scored: `[B, T]` bool, places whose prediction is scored.

        Returns:
            hidden `[N, H]`; index `[M]` int64, in row-major order of `scored`; the backbone's
            output, with router logits laid out as the padded batch is.
        """
        plan = self._plan(arguments, scored)
        if plan is None:
            output = model.base_model(**{**arguments, "use_cache": False})
            places = scored.numel()
            self._count(model, places, places, places, scored)
            return output.last_hidden_state.flatten(0, 1), scored.flatten().nonzero()[:, 0], output
        self.packed_forwards += 1
        kept = set(arguments) - _LAYOUT_ARGUMENTS - set(_NEUTRAL_ARGUMENTS)
        output = model.base_model(
            input_ids=plan.input_ids[None],
            position_ids=plan.position_ids[None],
            attention_mask=attention.dummy_mask(model.dtype, plan.input_ids.device),
            use_cache=False,
            prefix_plan=plan,
            **{name: arguments[name] for name in kept},
        )
        if getattr(output, "router_logits", None) is not None:
            output.router_logits = tuple(
                _lay_out_rows(logits, plan.token_index) for logits in output.router_logits
            )
        self._count(
            model, plan.num_padded_tokens, plan.num_row_tokens, plan.num_unique_tokens, scored
        )
        return output.last_hidden_state[0], plan.token_index[scored], output

    def _plan(self, arguments: dict[str, Any], scored: Tensor) -> PackPlan | None:
        reason = self.unpackable_reason or foreign_argument(arguments)
        if not self.is_installed:
            reason = "the engine was removed; this is a copy of its model"
        if reason is None:
            # Every token enters a load-balancing loss, and a batch without labels still has to
            # reach every parameter; otherwise tokens behind the last scored place are left out.
            keep_all = bool(arguments.get("output_router_logits")) or not bool(scored.any())
            try:
                return pack(
                    arguments["input_ids"],
                    arguments.get("attention_mask"),
                    arguments.get("position_ids"),
                    scored=None if keep_all else scored,
                    share=self.prefix_sharing,
                )
            except UnpackableBatchError as error:
                reason = str(error)
        self.fall_back(f"batch not packed: {reason}")
        return None

    def _count(
        self, model: PreTrainedModel, padded: int, rows: int, unique: int, scored: Tensor
    ) -> None:
        if model.training and torch.is_grad_enabled():
            self.stats.padded_tokens += padded
            self.stats.row_tokens += rows
            self.stats.unique_tokens += unique
            self.stats.scored_tokens += int(scored.sum())

    @contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """The model in eval mode and without gradients, every module's own mode restored after."""
        was_training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in was_training.items():
                module.training = training
            reshard(self.model)


_ENGINES: weakref.WeakKeyDictionary[nn.Module, PackedBackbone] = weakref.WeakKeyDictionary()


def installed_engines() -> list[PackedBackbone]:
    """Every engine that is installed on a living model."""
    return list(_ENGINES.values())


def foreign_argument(arguments: dict[str, Any]) -> str | None:
    """Why these arguments cannot be packed, or None if they can."""
    if "input_ids" not in arguments:
        return "input_ids are missing (embeddings were passed instead)"
    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return "attention_mask is not [batch, tokens]"
    for name, value in arguments.items():
        if name in _LAYOUT_ARGUMENTS or name == "output_router_logits":
            continue
        if name not in _NEUTRAL_ARGUMENTS:
            return f"argument '{name}' has no packed form"
        if isinstance(value, Tensor) or value not in _NEUTRAL_ARGUMENTS[name]:
            return f"argument '{name}' has no packed form at this value"
    return None


def _lay_out_rows(logits: Tensor, token_index: Tensor) -> Tensor:
    """Router logits `[N, E]` of unique tokens as `[B*T, E]` of the padded batch."""
    return logits[token_index.flatten().clamp(min=0)]


__all__ = ["FastpostWarning", "PackedBackbone", "foreign_argument", "installed_engines"]
