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
import types
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastpost import attention, layers
from fastpost.head import Head, unscorable_reason
from fastpost.packing import PackPlan, UnpackableBatchError, pack
from fastpost.scored_output import ScoredOutput, TokenStats
from fastpost.self_check import compare_head, compare_packed

IGNORE_INDEX = -100
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

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
        outputs: fields of `ScoredOutput` to compute beside `log_probs`.

    Returns:
        The `Engine`: `report()`, `stats`, and `remove()`, which restores the model exactly.

    Raises:
        TypeError: not a transformers model with an output embedding.
        ValueError: unknown output name, non-positive temperature or budget, or the model's own
            logits differ from what the head computes.
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
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if memory_budget_gb is not None and not memory_budget_gb > 0:
        raise ValueError(f"memory_budget_gb must be positive, got {memory_budget_gb}")
    if base in _ENGINES:
        _ENGINES[base].remove()
    budget = None if memory_budget_gb is None else int(memory_budget_gb * 2**30)
    head = Head.of(base, temperature, cast_lm_head_to_fp32, budget)
    engine = Engine(base, head, prefix_sharing, tuple(o for o in outputs if o != "log_probs"))
    _ENGINES[base] = engine
    return engine


class Engine:
    """A model's installed forward: what it replaced, what it fell back on, what it computed.

    Attributes:
        stats: tokens of the training forwards so far.
        fallbacks: reason -> times a call did not take the fast path.
        self_check: what the comparison with the model's own forward found at start.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        prefix_sharing: bool,
        outputs: tuple[str, ...],
    ) -> None:
        self.model = model
        self.head = head
        self.prefix_sharing = prefix_sharing
        self.outputs = outputs
        self.stats = TokenStats()
        self.fallbacks: Counter[str] = Counter()
        self.packed_forwards = 0
        self.is_installed = True
        self.unpackable_reason = attention.unsupported_reason(model)
        self._is_attached = self.unpackable_reason is None
        if self._is_attached:
            attention.attach(model)
        # On GPUs fused layers come with the model (`use_kernels=True`) or from Liger.
        self.fused_layers = layers.attach(model) if model.device.type == "cpu" else []
        self._had_forward = "forward" in model.__dict__
        self._original_forward: Callable[..., Any] = model.forward
        self._forward = types.MethodType(_make_forward(self, type(model).forward), model)
        model.forward = self._forward
        try:
            self.self_check = self._run_self_check()
        except Exception:
            self.remove()
            raise

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
        reason = self.unpackable_reason or _foreign_argument(arguments)
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
        result = self._score_unique(model, hidden, index, targets[mask])

        def place(values: Tensor) -> Tensor:
            # `masked_scatter` keeps a batch without labels connected to the model.
            return values.new_zeros(mask.shape).masked_scatter(mask.to(values.device), values)

        log_probs = place(result.logprob)
        optional = {name: place(getattr(result, name)) for name in self.outputs}
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
        self, model: PreTrainedModel, hidden: Tensor, index: Tensor, targets: Tensor
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
            return self.head.score(model, hidden[index], targets, self.outputs)
        rows = hidden[torch.div(keys, vocab, rounding_mode="floor")]
        result = self.head.score(model, rows, keys % vocab, self.outputs)
        return result._replace(
            **{
                name: None if values is None else values[inverse]
                for name, values in result._asdict().items()
            }
        )

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
        was_training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                found = [compare_head(self.model, self.head, self._original_forward)]
                if self.unpackable_reason is None:
                    refusal, difference = compare_packed(self.model, self.run_backbone)
                    found.append(difference)
                    if refusal is not None:
                        self.unpackable_reason = refusal
                        self.fall_back(f"packing refused: {refusal}")
        finally:
            for module, training in was_training.items():
                module.training = training
            self.packed_forwards = 0
        return ", ".join(found)


_ENGINES: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()


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
            reason = unscorable_reason(self) or _foreign_argument(given)
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


def _foreign_argument(arguments: dict[str, Any]) -> str | None:
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


def _lay_out_rows(logits: Tensor, token_index: Tensor) -> Tensor:
    """Router logits `[N, E]` of unique tokens as `[B*T, E]` of the padded batch."""
    return logits[token_index.flatten().clamp(min=0)]


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


__all__ = ["Engine", "FastpostWarning", "accelerate_model"]
