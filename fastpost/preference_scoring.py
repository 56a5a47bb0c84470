"""Both sides of a preference batch through one call of the kernel `preference_logratio`.

    reference backbone ─► rows kept, or sums ─┐
    policy backbone ──► rows ─────────────────┴─► preference_logratio ─► log-probs, sums, log-ratios

The reference runs first, so what its forward needs is gone before the policy's activations are kept
for the backward. Where it is the policy with its adapter off, its rows wait for the policy's and
both go over their one head together. A reference with a head of its own has nothing to share, and
is summed at once: sums are fewer numbers than rows. A policy whose head the kernel does not take
(an adapter on it, a weight spread over processes) is scored by `Head.score`, and summed here.

Both classes are scorers for `Engine.scored_by`. Legend: U distinct rows, M scored places, S
sequences, chosen before rejected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpost.head import Head, is_plain_head
from fastpost.scoring import DistinctRows
from fastpost_kernels import HeadRows, LinearLogprob, PreferenceLogratio


class KeptRows:
    """Keeps the rows of a forward instead of scoring them; their log-probs read as zeros.

    Attributes:
        rows: what was kept, None before the forward.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self.rows: HeadRows | None = None

    def __call__(
        self, model: PreTrainedModel, rows: DistinctRows, outputs: tuple[str, ...]
    ) -> LinearLogprob:
        self.rows = self._head.rows(model, rows.hidden.detach(), rows.targets, rows.places)
        zeros = rows.hidden.new_zeros(len(rows.hidden), dtype=torch.float32)
        return LinearLogprob(zeros, **dict.fromkeys(outputs, zeros))


class PairScorer:
    """Scores the policy's rows against a reference."""

    def __init__(
        self, head: Head, reference: HeadRows | Tensor, ld_alpha: float | None = None
    ) -> None:
        """
        Args:
            head: the policy's.
            reference: rows kept by `KeptRows`, or sums `[S]`.
            ld_alpha: weight of tokens behind the shorter answer's length (LD-DPO); None for 1.
        """
        self._head, self._reference, self._ld_alpha = head, reference, ld_alpha
        self._scores: PreferenceLogratio | None = None

    @property
    def scores(self) -> PreferenceLogratio:
        """Sums, log-ratios and margins of the batch. Raises RuntimeError before the forward."""
        if self._scores is None:
            raise RuntimeError(
                "no rows were scored yet: call the model within scored_by(...) first"
            )
        return self._scores

    def __call__(self, model: PreTrainedModel, rows: DistinctRows, outputs: tuple[str, ...]) -> Any:
        seq_lens, weights = rows.seq_lens, None
        if self._ld_alpha is not None:
            weights = length_desensitised_weights(seq_lens, self._ld_alpha)
        cu_seqlens = torch.cat([seq_lens.new_zeros(1), seq_lens.cumsum(0)])
        if not is_plain_head(model):
            found = self._head.score(model, rows.hidden, rows.targets, outputs)
            self._scores = self._summed(found.logprob, rows, cu_seqlens, weights)
            return found
        policy = self._head.rows(model, rows.hidden, rows.targets, rows.places)
        cu_seqlens = cu_seqlens.to(policy.hidden.device)
        weights = None if weights is None else weights.to(policy.hidden.device)
        scores = self._head.logratio(policy, self._reference, cu_seqlens, weights, outputs)
        self._scores = scores
        return LinearLogprob(scores.logprob, **{name: getattr(scores, name) for name in outputs})

    def _summed(
        self, logprob: Tensor, rows: DistinctRows, cu_seqlens: Tensor, weights: Tensor | None
    ) -> PreferenceLogratio:
        """What the kernel returns, from log-probs `[U]` of rows."""
        if not isinstance(self._reference, Tensor):
            raise ValueError("rows of a reference need a policy with a plain head; pass its sums")
        values = logprob if rows.places is None else logprob[rows.places.to(logprob.device)]
        values = values.double() if weights is None else values.double() * weights.to(values.device)
        offsets = cu_seqlens.to(values.device)
        logps = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True).to(logprob.dtype)
        ref_logps = self._reference.to(logps)
        num_tokens = rows.seq_lens.to(logps.device)
        logratios = logps - ref_logps
        chosen, rejected = logratios.chunk(2)
        return PreferenceLogratio(
            logps,
            logps / num_tokens.clamp(min=1),
            ref_logps,
            logratios,
            chosen - rejected,
            num_tokens,
            logprob,
        )


def length_desensitised_weights(seq_lens: Tensor, ld_alpha: float) -> Tensor:
    """`[M]` fp32: 1 up to the length both answers of a pair have, `ld_alpha` behind it.

    (Liu 2024, arXiv 2409.06411; the sums are those of `losses.ld_dpo`.)

    Args:
        seq_lens: `[S]` scored tokens, chosen before rejected.
    """
    shared = torch.minimum(*seq_lens.chunk(2)).repeat(2)
    starts = seq_lens.cumsum(0) - seq_lens
    ends_shared = (starts + shared).repeat_interleave(seq_lens)
    position = torch.arange(len(ends_shared), device=seq_lens.device)
    return torch.where(position < ends_shared, 1.0, ld_alpha)


__all__ = ["KeptRows", "PairScorer", "length_desensitised_weights"]
