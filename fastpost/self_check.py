"""Does the fast path agree with the model in hand? Asked once, when it is installed.

Packing goes wrong without a trace when a layer mixes tokens in a way attention metadata does not
govern (a recurrent state, a convolution, a bidirectional block): the loss curve looks normal and
the model learns from other rows' tokens. Two short sequences tell: what is packed beside a row must
not change it, and a row must come out as it does alone.

The first question has a sharp answer in any precision. The second has not: thirty layers of bf16
rounding alone make two correct computations differ by several percent, so its tolerance is wide in
half precision and only catches gross errors (wrong positions, a wrong mask). A model may amplify
rounding further, trained adapters do: then what one rounding of the embeddings does to the model's
own forward is the measure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fastpost.head import Head

# Relative difference of a row's hidden states when another row changes.
_LEAK_TOLERANCE = 1e-2
# Relative difference between a row packed and alone.
_HIDDEN_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HIDDEN_TOLERANCE_HALF = 0.3
# In half precision: so many times what one rounding does, but never so far that two unrelated rows
# (distance about 1.4) would pass.
_TIMES_ROUNDING, _UNRELATED = 4.0, 0.8
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
    run: Any = model
    if isinstance(model, FSDPModule):
        run(input_ids=ids, use_cache=False)  # FSDP takes for its root what is called first
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
    """Compare two packed sequences with the same two run separately, and with other neighbours.

    Returns:
        Why packing must be refused (None if it need not), and the differences in words.
    """

    def pack_and_run(ids: Tensor) -> Tensor:
        hidden, index, _ = run_backbone(model, {"input_ids": ids}, torch.ones_like(ids).bool())
        return hidden[index].reshape(*ids.shape, -1).double()

    ids = _sequences(model)
    packed = pack_and_run(ids)
    leak = 0.0
    for row in (0, 1):
        # The first token behind the shared ones stays, and with it the rows' order in the pack.
        other = ids.clone()
        other[row, 13:] = other[row, :3]
        leak = max(leak, _distance(pack_and_run(other)[1 - row], packed[1 - row]))
    alone = [model.base_model(input_ids=row[None], use_cache=False) for row in ids]
    separate = torch.stack([output.last_hidden_state[0] for output in alone]).double()
    error = _distance(packed, separate)
    found = f"packed rows {error:.1e} from separate ones, {leak:.1e} from other neighbours"
    if leak <= _LEAK_TOLERANCE and error <= _hidden_tolerance(model, ids, error):
        return None, found
    return f"a layer of {type(model).__name__} mixes tokens across sequences ({found})", found


def _hidden_tolerance(model: PreTrainedModel, ids: Tensor, error: float) -> float:
    if model.dtype in _HIDDEN_TOLERANCE:
        return _HIDDEN_TOLERANCE[model.dtype]
    if error <= _HIDDEN_TOLERANCE_HALF:
        return _HIDDEN_TOLERANCE_HALF
    embeddings = model.get_input_embeddings()(ids)
    signs = torch.ones_like(embeddings)
    signs[..., ::2] = -1
    rounded = embeddings * (1 + signs * torch.finfo(embeddings.dtype).eps)
    states = [
        model.base_model(inputs_embeds=given, use_cache=False).last_hidden_state.double()
        for given in (embeddings, rounded)
    ]
    return min(_TIMES_ROUNDING * _distance(*states), _UNRELATED)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


__all__ = ["compare_head", "compare_packed"]
