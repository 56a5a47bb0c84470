"""Sampling of completions, traced at its two moments of most memory.

    prefill    all prompts of an optimizer step at once, keys and values kept
    decode     the last token: a cache of all tokens but one, which grows by copying each layer's

Prompts are of equal length (padding would be masked, not left out). Every GPU samples the
completions that it learns from: rows x batches of an optimizer step, as TRL generates them in one
call. With `rollout_dtype` they come from a copy in that dtype, whole on every GPU, which stays for
good (`fastpost.rollout.cast_copy`); without it from the trained model, which FSDP2 gathers layer by
layer for every token. A server that samples (vLLM) is not planned.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

from fastpost.planning.ledger import ROLLOUT_CACHE, ROLLOUT_COPY
from fastpost.planning.models import make_model
from fastpost.planning.request import Request
from fastpost.planning.tracer import Tracer

__all__ = ["Rollouts"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Rollouts:
    """Samples as a GRPO or RLOO trainer does between two optimizer steps.

    Attributes:
        figures: what the prediction of time needs: "prefill_flops" of all completions,
            "weight_bytes" read for a token, "cache_bytes" at the end, "gathered_bytes" for a token.
    """

    def __init__(self, request: Request, config: Any, model: Any, tracer: Tracer) -> None:
        self._request, self._config = request, config
        self._model, self._tracer = model, tracer
        self._copy: Any = None
        self.figures: dict[str, int] = {}

    @torch.no_grad()
    def sample(self, step: str) -> None:
        """One rollout, before the batches of `step`."""
        request, tracer = self._request, self._tracer
        rows = request.rows * request.accumulation
        with unset_fake_temporarily():
            prompts = torch.ones(rows, max(1, request.num_prompt), dtype=torch.int64)
            token = torch.ones(rows, 1, dtype=torch.int64)
        tracer.flops.clear()
        tracer.collectives.clear()
        with tracer.during(f"{step}, rollout"), _evaluated(self._model):
            model = self._model if request.rollout_dtype is None else self._refreshed()
            cache = DynamicCache(config=self._config.get_text_config())
            scores = self._next(model, prompts, cache)
            prefill = Counter(tracer.flops)
            tracer.collectives.clear()
            self._fill(cache)
            # the recorder of log-probs holds the scores of one token while the next ones come
            held, scores = scores, self._next(model, token, cache)
            self._log_prob(held, token)
            self.figures = {
                "prefill_flops": prefill.total(),
                "weight_bytes": sum(_bytes(p) for p in model.parameters()),
                "cache_bytes": sum(_bytes(t) for t in _tensors(cache)),
                "gathered_bytes": tracer.collectives.total(),
            }
        tracer.flops.clear()
        tracer.collectives.clear()

    def _next(self, model: Any, ids: Tensor, cache: Any) -> Tensor:
        """Scores [rows, V] fp32 for the next token, and a draw from them, as `generate` does."""
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for tensor in _tensors(cache):
            self._tracer.name(tensor, ROLLOUT_CACHE)
        scores = output.logits[:, -1].to(torch.float32, copy=True)
        torch.multinomial(torch.softmax(scores, -1), 1)
        return scores

    def _log_prob(self, scores: Tensor, tokens: Tensor) -> Tensor:
        scaled = scores.float() / 1.0
        return scaled.gather(1, tokens)[:, 0] - scaled.logsumexp(-1)

    def _fill(self, cache: Any) -> None:
        """As long as before the last token."""
        for layer in cache.layers:
            length = self._request.seq - 1
            window = getattr(layer, "sliding_window", None)
            length = length if window is None else min(length, window - 1)
            for name in ("keys", "values"):
                rows, heads, _, width = getattr(layer, name).shape
                longer = getattr(layer, name).new_empty(rows, heads, length, width)
                self._tracer.name(longer, ROLLOUT_CACHE)
                setattr(layer, name, longer)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = self._request.seq - 1

    def _refreshed(self) -> Any:
        """The copy, made at the first call, with the weights as they are."""
        base = getattr(self._model, "get_base_model", lambda: self._model)()
        if self._copy is None:
            dtype = _DTYPES[str(self._request.rollout_dtype)]
            self._copy = make_model(self._config, dtype).eval().requires_grad_(False)
            for tensor in itertools.chain(self._copy.parameters(), self._copy.buffers()):
                self._tracer.name(tensor, ROLLOUT_COPY)
        targets = dict(self._copy.named_parameters())
        for module in base.modules():
            _merge(module)
        for name, weight in base.named_parameters():
            target = targets.get(name.replace("base_layer.", ""))
            if target is not None:
                target.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)
        return self._copy


def _merge(module: Any) -> None:
    """What merging an adapter into one layer takes: a copy of it, and the product."""
    if not isinstance(module, BaseTunerLayer) or not hasattr(module, "lora_A"):
        return
    weight: Any = module.get_base_layer().weight
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()
    a, b = (getattr(module, name)["default"].weight for name in ("lora_A", "lora_B"))
    delta = b @ a
    delta = delta.full_tensor() if isinstance(delta, DTensor) else delta
    weight += delta.to(weight.dtype)


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _tensors(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
