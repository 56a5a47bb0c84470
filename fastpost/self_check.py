"""Does the fast path agree with the model in hand? Asked once, when it is installed.

Packing goes wrong without a trace when a layer mixes tokens in a way attention metadata does not
govern (a recurrent state, a convolution, a bidirectional block): the loss curve looks normal and
the model learns from other rows' tokens. Two short sequences tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpost.head import Head

# Relative difference of hidden states at which packing is refused. Rows that leak into each other
# differ by 0.1 to 1; rounding in half precision stays near 0.01.
_HIDDEN_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HIDDEN_TOLERANCE_HALF = 0.08
# Largest difference of a log-prob. Half-precision logits near 30 are rounded by 0.06.
_LOGPROB_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
_LOGPROB_TOLERANCE_HALF = 0.3


def _sequences(model: PreTrainedModel) -> Tensor:
    """Two rows of 16 tokens that part after 12."""
    embedding = model.get_input_embeddings().weight
    row = torch.arange(5, 21, device=embedding.device) % embedding.shape[0]
    return torch.stack([row, torch.cat([row[:12], row[:4]])])


def compare_head(model: PreTrainedModel, head: Head, stock_forward: Callable[..., Any]) -> str:
    """Compare the kernel's log-probs with those of the model's own logits.

    Raises:
        ValueError: they differ, so the head is not the linear map it was taken for.
    """
    ids = _sequences(model)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logits = stock_forward(input_ids=ids, use_cache=False).logits[:, :-1].double()
    expected = (logits / head.temperature).log_softmax(-1).gather(-1, ids[:, 1:, None])
    actual = head.score(model, hidden.flatten(0, 1), ids[:, 1:].flatten(), ()).logprob
    error = float((actual.double() - expected.flatten().to(actual.device)).abs().max())
    if not error <= _LOGPROB_TOLERANCE.get(model.dtype, _LOGPROB_TOLERANCE_HALF):
        raise ValueError(
            f"the head of {type(model).__name__} is not the linear map it was taken for: its "
            f"log-probs differ by {error:.3g} from the model's own. Train this model with the "
            "stock trainer and report the architecture"
        )
    return f"log-probs within {error:.1e} of the model's own"


def compare_packed(
    model: PreTrainedModel,
    run_backbone: Callable[[PreTrainedModel, dict[str, Any], Tensor], tuple[Tensor, Tensor, Any]],
) -> tuple[str | None, str]:
    """Compare two packed sequences with the same two run separately.

    Returns:
        Why packing must be refused (None if it need not), and the difference in words.
    """
    ids = _sequences(model)
    hidden, index, _ = run_backbone(model, {"input_ids": ids}, torch.ones_like(ids).bool())
    packed = hidden[index].double()
    separate = torch.cat(
        [model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in ids]
    ).double()
    error = float((packed - separate).norm() / separate.norm())
    difference = f"packed against separate hidden states {error:.1e}"
    if error <= _HIDDEN_TOLERANCE.get(model.dtype, _HIDDEN_TOLERANCE_HALF):
        return None, difference
    return (
        f"two packed sequences differ from the same two run separately ({difference}); a layer "
        f"of {type(model).__name__} mixes tokens across sequences",
        difference,
    )


__all__ = ["compare_head", "compare_packed"]
