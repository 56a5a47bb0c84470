"""Attention of one region: its partial output with log-sum-exp, and its gradients.

Two implementations. `flash` is PyTorch's blockwise CPU kernel: no score matrix in memory, but
neither window nor softcap. `explicit` computes scores in row chunks of bounded size, on any device,
with both.

Partial results of one row over disjoint key sets merge exactly through their log-sum-exps:
lse = log Σ_r exp(lse_r), out = Σ_r exp(lse_r − lse)·out_r (Milakov and Gimelshein,
arXiv:1805.02867, eq. 4). The backward needs no merging: with the merged `out` and `lse`,
p = exp(s − lse) and delta = Σ_d dO·O are the global ones, so each region's gradients simply add.

Shapes: B copies, Hq query heads, Hk key heads (G = Hq / Hk queries each), Lq and Lk lengths, D head
size of query and key, Dv of value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MAX_SCORES",
    "Scoring",
    "accumulate_dtype",
    "copies_per_backward",
    "explicit_backward",
    "explicit_forward",
    "flash_backward",
    "flash_forward",
    "with_sinks",
]

# Scores held at once by `explicit`: 2^22 fp32 values are 16 MB, a few of which live together.
MAX_SCORES = 1 << 22
# PyTorch's 16-bit backward packs its operands anew for every block of queries. Up to about this
# many rows that costs more than the multiplication: fp32 is 2.6x faster at 160 rows, equal at 512.
_MIN_ROWS_16BIT_BACKWARD = 384
# Copies of one length go through the backward together only up to about this many rows: beyond,
# their fp32 operands leave the cache (28 ms for 16 x 160 rows at once, 23 ms one by one).
_MAX_ROWS_BACKWARD = 256


class Scoring(NamedTuple):
    """How a score is made from a query and a key: softcap·tanh(scale·q·k / softcap), windowed."""

    scale: float
    window: int | None
    softcap: float | None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out [Hq, N, Dv], lse [Hq, N]) with a sink [Hq]: one more key, with value zero, which only
    enlarges the denominator."""
    merged = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(1))
    return out * torch.exp(lse - merged).unsqueeze(-1), merged


def copies_per_backward(length: int, num_heads: int) -> int:
    """How many copies of a region of `length` rows one backward call should take.

    Few enough to stay in cache, yet two heads for every thread.
    """
    for_threads = -(-2 * torch.get_num_threads() // num_heads)
    return max(1, _MAX_ROWS_BACKWARD // length, for_threads)


def flash_forward(
    query: Tensor,  # [B, Hq, Lq, D]
    key: Tensor,  # [B, Hk, Lk, D]
    value: Tensor,  # [B, Hk, Lk, D]
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns (out [B, Hq, Lq, D], lse [B, Hq, Lq] in the accumulation dtype)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scale
    )


def flash_backward(
    grad_out: Tensor,  # [B, Hq, Lq, D]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,  # merged over all regions
    lse: Tensor,  # merged over all regions
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns this region's share of (dQ, dK, dV), 16- or 32-bit as was faster."""
    if query.dtype.itemsize == 2 and query.shape[2] < _MIN_ROWS_16BIT_BACKWARD:
        grad_out, query, key, value, out = (x.float() for x in (grad_out, query, key, value, out))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, lse, 0.0, is_causal, scale=scale
    )


def explicit_forward(
    query: Tensor,  # [B, Hq, Lq, D]
    key: Tensor,  # [B, Hk, Lk, D]
    value: Tensor,  # [B, Hk, Lk, Dv]
    query_positions: Tensor,  # [Lq] CPU
    key_positions: Tensor,  # [Lk] CPU, consecutive
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Returns (out [B, Hq, Lq, Dv], lse [B, Hq, Lq]), rows without a visible key as (0, −inf)."""
    batch, num_heads, num_rows, _ = query.shape
    dtype = accumulate_dtype(query.dtype)
    out = query.new_zeros(batch, num_heads, num_rows, value.shape[-1], dtype=dtype)
    lse = query.new_full((batch, num_heads, num_rows), -torch.inf, dtype=dtype)
    for rows, keys in _chunks(query, key, query_positions, key_positions, scoring.window):
        k, v = key[:, :, keys].to(dtype), value[:, :, keys].to(dtype)
        q = _fold(query[:, :, rows].to(dtype), key.shape[1])
        scores, _ = _scores(q, k, query_positions[rows], key_positions[keys], scoring)
        chunk_lse = scores.logsumexp(-1)
        # A row that sees nothing has lse −inf; exp(−inf − 0) keeps it at zero instead of NaN.
        p = torch.exp(scores - chunk_lse.masked_fill(chunk_lse == -torch.inf, 0.0).unsqueeze(-1))
        out[:, :, rows] = _unfold(p @ v, num_heads)
        lse[:, :, rows] = _unfold(chunk_lse.unsqueeze(-1), num_heads).squeeze(-1)
    return out, lse


def explicit_backward(
    grad_out: Tensor,  # [B, Hq, Lq, Dv]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,  # merged over all regions
    lse: Tensor,  # merged over all regions
    query_positions: Tensor,
    key_positions: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns this region's share of (dQ, dK, dV) in the accumulation dtype.

    With c = softcap, s = scale·q·k and z = c·tanh(s / c): dz/ds = 1 − (z / c)².
    """
    dtype = accumulate_dtype(query.dtype)
    num_heads, num_key_heads = query.shape[1], key.shape[1]
    grad_query = torch.zeros_like(query, dtype=dtype)
    grad_key = torch.zeros_like(key, dtype=dtype)
    grad_value = torch.zeros_like(value, dtype=dtype)
    for rows, keys in _chunks(query, key, query_positions, key_positions, scoring.window):
        q, d_out, o, row_lse = (
            _fold(x[:, :, rows].to(dtype), num_key_heads)
            for x in (query, grad_out, out, lse.unsqueeze(-1))
        )
        k, v = key[:, :, keys].to(dtype), value[:, :, keys].to(dtype)
        scores, slope = _scores(q, k, query_positions[rows], key_positions[keys], scoring)
        p = torch.exp(scores - row_lse)
        grad_value[:, :, keys] += p.mT @ d_out
        delta = (d_out * o).sum(-1, keepdim=True)
        d_scores = p * (d_out @ v.mT - delta)
        if slope is not None:
            d_scores = d_scores * slope
        d_scores = d_scores * scoring.scale
        grad_query[:, :, rows] = _unfold(d_scores @ k, num_heads)
        grad_key[:, :, keys] += d_scores.mT @ q
    return grad_query, grad_key, grad_value


def _scores(
    query: Tensor,  # [B, Hk, G·rows, D]
    key: Tensor,  # [B, Hk, keys, D]
    query_positions: Tensor,
    key_positions: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor | None]:
    """Returns masked scores [B, Hk, G·rows, keys] and the softcap's slope, None without softcap."""
    scores = (query @ key.mT) * scoring.scale
    slope = None
    if scoring.softcap is not None:
        capped = torch.tanh(scores / scoring.softcap)
        slope = 1.0 - capped.square()
        scores = capped * scoring.softcap
    distance = query_positions.unsqueeze(1) - key_positions
    visible = distance >= 0
    if scoring.window is not None:
        visible &= distance < scoring.window
    if not bool(visible.all()):
        groups = query.shape[2] // query_positions.shape[0]
        hidden = ~visible.to(scores.device)
        scores = scores.unflatten(2, (groups, -1)).masked_fill(hidden, -torch.inf).flatten(2, 3)
    return scores, slope


def _fold(x: Tensor, num_key_heads: int) -> Tensor:
    """[B, Hq, rows, E] to [B, Hk, G·rows, E]: queries of one key head, one under another."""
    return x.unflatten(1, (num_key_heads, -1)).flatten(2, 3)


def _unfold(x: Tensor, num_heads: int) -> Tensor:
    """[B, Hk, G·rows, E] back to [B, Hq, rows, E]."""
    return x.unflatten(2, (num_heads // x.shape[1], -1)).flatten(1, 2)


def _chunks(
    query: Tensor,
    key: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
) -> list[tuple[slice, slice]]:
    """Row ranges of bounded score memory, each with the keys any of its rows can see."""
    batch, num_heads, num_rows, _ = query.shape
    num_keys = key.shape[2]
    step = max(1, MAX_SCORES // (batch * num_heads * num_keys))
    first_key = int(key_positions[0])
    chunks = []
    for start in range(0, num_rows, step):
        positions = query_positions[start : start + step]
        high = min(num_keys, int(positions.max()) - first_key + 1)
        low = 0 if window is None else max(0, int(positions.min()) - window + 1 - first_key)
        if low < high:
            chunks.append((slice(start, start + len(positions)), slice(low, high)))
    return chunks
