"""The two functions of flash-attn 2.8 that our adapter calls, in plain torch, on any device.

Parameters, checks, masks and rounding are those of the package: windows are aligned to the last
key, bounds beyond `max_seqlen_k` count as none, probabilities and their gradients are rounded to
the operands' dtype before they are multiplied, and `out` and `softmax_lse` are taken as given in
the backward. float32 and float64 are served as well, for exact comparisons.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["varlen_backward", "varlen_forward"]


def varlen_forward(
    q: Tensor,  # [Tq, Hq, D]
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (out [Tq, Hq, D], lse [Hq, Tq], two results that nobody reads)."""
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p)
    others = (alibi_slopes, block_table, leftpad_k, seqused_k)
    assert not return_softmax and not zero_tensors and others == (None,) * 4
    window = _window(causal, window_size_left, window_size_right, max_seqlen_k)
    sum_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=sum_dtype)
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        query, key, value = _heads(q[rows], k[keys], v[keys])
        scores, _ = _scores(query, key, softmax_scale, softcap, window)
        lse[:, rows] = scores.logsumexp(-1)
        p = torch.exp(scores - lse[:, rows].unsqueeze(-1)).to(q.dtype).to(sum_dtype)
        out[rows] = (p @ value).transpose(0, 1).to(q.dtype)
    return out, lse, q.new_empty(0), q.new_empty(2)


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes dq, dk and dv; returns dO·O."""
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p)
    assert deterministic and alibi_slopes is None and rng_state is None and not zero_tensors
    assert dout.shape == out.shape == q.shape and dout.dtype == out.dtype == q.dtype
    assert softmax_lse.shape == (q.shape[1], q.shape[0]) and softmax_lse.is_contiguous()
    assert dq is not None and dk is not None and dv is not None
    window = _window(causal, window_size_left, window_size_right, max_seqlen_k)
    dtype = q.dtype
    delta = torch.full_like(softmax_lse, torch.nan)
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        query, key, value = _heads(q[rows], k[keys], v[keys])
        sum_dtype = query.dtype
        d_out, o = (x[rows].transpose(0, 1).to(sum_dtype) for x in (dout, out))
        scores, slope = _scores(query, key, softmax_scale, softcap, window)
        p = torch.exp(scores - softmax_lse[:, rows].unsqueeze(-1))
        delta[:, rows] = (d_out * o).sum(-1)
        d_scores = p * (d_out @ value.mT - delta[:, rows].unsqueeze(-1)) * slope
        p, d_scores = (x.to(dtype).to(sum_dtype) for x in (p, d_scores))
        groups = q.shape[1] // k.shape[1]
        # One gradient for each query head, rounded, then summed over the group.
        d_key = (d_scores.mT @ query * softmax_scale).to(dtype).to(sum_dtype)
        d_value = (p.mT @ d_out).to(dtype).to(sum_dtype)
        dq[rows] = (d_scores @ key * softmax_scale).transpose(0, 1).to(dtype)
        dk[keys] = d_key.unflatten(0, (-1, groups)).sum(1).transpose(0, 1).to(dtype)
        dv[keys] = d_value.unflatten(0, (-1, groups)).sum(1).transpose(0, 1).to(dtype)
    return delta


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
) -> None:
    assert dropout_p == 0.0
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256 and q.shape[2] % 8 == 0
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    assert q.dtype == k.dtype == v.dtype
    for x in (q, k, v):
        # what 16-byte loads need, which the package leaves to its caller
        assert x.stride(2) == 1 and x.stride(0) % 8 == x.stride(1) % 8 == 0
        assert x.storage_offset() % 8 == 0
    assert cu_seqlens_q.shape == cu_seqlens_k.shape and len(cu_seqlens_q) > 1
    for cumulative, total, longest in (
        (cu_seqlens_q, len(q), max_seqlen_q),
        (cu_seqlens_k, len(k), max_seqlen_k),
    ):
        lengths = cumulative.diff()
        assert cumulative.dtype == torch.int32 and cumulative.is_contiguous()
        assert cumulative[0] == 0 and cumulative[-1] == total
        assert lengths.min() > 0 and lengths.max() <= longest
    assert max_seqlen_q > 1  # else the forward takes another way


def _window(causal: bool, left: int, right: int, max_keys: int) -> tuple[int, int] | None:
    right = 0 if causal else right
    left = -1 if left >= max_keys else left
    right = -1 if right >= max_keys else right
    if left < 0 and right < 0:
        return None
    return (max_keys if left < 0 else left), (max_keys if right < 0 else right)


def _sequences(cu_queries: Tensor, cu_keys: Tensor) -> list[tuple[slice, slice]]:
    ends = list(zip(cu_queries.tolist(), cu_keys.tolist(), strict=True))
    return [
        (slice(query, next_query), slice(key, next_key))
        for (query, key), (next_query, next_key) in pairwise(ends)
    ]


def _heads(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """[Hq, L, D] each, in the dtype of sums."""
    sum_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    return [
        x.transpose(0, 1).to(sum_dtype)
        for x in (query, *(x.repeat_interleave(groups, 1) for x in (key, value)))
    ]


def _scores(
    query: Tensor, key: Tensor, scale: float, softcap: float, window: tuple[int, int] | None
) -> tuple[Tensor, Tensor | float]:
    """Masked scores [Hq, Lq, Lk] and the softcap's slope."""
    scores, slope = query @ key.mT * scale, 1.0
    if softcap > 0:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1.0 - capped.square()
    if window is not None:
        offset = key.shape[1] - query.shape[1]
        place = torch.arange(query.shape[1])[:, None] + offset
        index = torch.arange(key.shape[1])
        seen = (index >= place - window[0]) & (index <= place + window[1])
        assert seen.any(1).all(), "a row without keys"
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores, slope
