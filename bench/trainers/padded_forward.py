"""The peer where TRL has no trainer: ours on the forward of a textbook implementation.

    padded rows [B, T] ─► the model's own backbone ─► logits [B, T, V] ─► log_softmax ─► log-probs

This is how TRL's PPO computed log-probs and entropies until it was taken out.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from fastpost.scored_output import ScoredOutput
from fastpost.scoring import Engine


def use_padded_forward(engine: Engine) -> None:
    """Take the engine's forward off its model and put the textbook one there."""
    engine.remove()
    model, temperature = engine.model, engine.head.temperature
    stock = engine.stock_forward(model)

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **arguments: Any) -> Any:
        if not fused_lm_head:
            return stock(*args, **arguments)
        labels: Tensor = arguments.pop("labels")
        inputs = {name: arguments[name] for name in ("input_ids", "attention_mask")}
        hidden = self.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = self.get_output_embeddings()(hidden) / temperature
        logps = torch.log_softmax(logits.float(), dim=-1)
        targets, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        output = ScoredOutput(
            log_probs=logps.gather(-1, targets[..., None])[..., 0] * mask,
            entropy=-(logps.exp() * logps).sum(-1) * mask,
            label_mask=mask,
        )
        if hasattr(self, "value_head"):
            weight = self.value_head.weight
            output.state_values = self.value_head(hidden.to(weight.dtype))[..., 0].float() * mask
        return output

    model.forward = types.MethodType(forward, model)


__all__ = ["use_padded_forward"]
