"""Forward and backward of prefix_attention over the regions of a schedule.

The forward places each segment's own result, then merges in what its descendants get from it. The
backward adds up what every region contributes, computed with the merged statistics.

Shapes: query [Hq, N, D], key [Hk, N, D], value [Hk, N, Dv]; regions see them as [B, H, L, ·].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._prefix_native import can_run_native, native_backward, native_forward
from ._prefix_regions import (
    Scoring,
    accumulate_dtype,
    copies_per_backward,
    explicit_backward,
    explicit_forward,
    flash_backward,
    flash_forward,
    with_sinks,
)
from ._prefix_segments import PrefixSchedule, Region

__all__ = ["backward", "forward"]


def _queries(x: Tensor, region: Region) -> Tensor:
    """Rows of [H, N, ...] that are this region's queries, as [B, H, Lq, ...]; never a copy."""
    return _rows(x, region.query_start, region.count, region.query_length)


def _keys(x: Tensor, region: Region) -> Tensor:
    return _rows(x, region.key_start, region.count, region.key_length)


def _rows(x: Tensor, start: int, count: int, length: int) -> Tensor:
    return x[:, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)


def _positions(schedule: PrefixSchedule, region: Region) -> tuple[Tensor, Tensor]:
    """Path positions of one copy's queries and keys; only their differences matter."""
    query_stop, key_stop = (
        region.query_start + region.query_length,
        region.key_start + region.key_length,
    )
    return (
        schedule.positions[region.query_start : query_stop],
        schedule.positions[region.key_start : key_stop],
    )


def _is_flash(region: Region, scoring: Scoring, backend: str) -> bool:
    """Whether the blockwise kernel can: on CPU, no softcap, no path longer than the window."""
    is_windowed = scoring.window is not None and region.max_distance >= scoring.window
    return backend == "cpu" and scoring.softcap is None and not is_windowed


def _is_out_of_sight(schedule: PrefixSchedule, region: Region, scoring: Scoring) -> bool:
    """Whether the window ends before this region for all of its queries."""
    if scoring.window is None or region.is_own:
        return False
    queries, keys = _positions(schedule, region)
    return int(queries.min() - keys.max()) >= scoring.window


def _region_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: PrefixSchedule,
    region: Region,
    scoring: Scoring,
    backend: str,
) -> tuple[Tensor, Tensor]:
    q, k, v = _queries(query, region), _keys(key, region), _keys(value, region)
    if _is_flash(region, scoring, backend):
        return flash_forward(q, k, v, region.is_own, scoring.scale)
    return explicit_forward(q, k, v, *_positions(schedule, region), scoring)


def _region_backward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    schedule: PrefixSchedule,
    region: Region,
    scoring: Scoring,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, query, key, value, out, lse = tensors
    d, q, o, row_lse = (_queries(x, region) for x in (grad_out, query, out, lse))
    k, v = _keys(key, region), _keys(value, region)
    if _is_flash(region, scoring, backend):
        return flash_backward(d, q, k, v, o, row_lse, region.is_own, scoring.scale)
    return explicit_backward(d, q, k, v, o, row_lse, *_positions(schedule, region), scoring)


def _forward_regions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: PrefixSchedule,
    scoring: Scoring,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns (out [Hq, N, Dv], lse [Hq, N]) without sinks; `out` is fp32 where regions merged."""
    if len(schedule.own) == 1 and not schedule.inherited:  # rows of one length: nothing to place
        part, part_lse = _region_forward(
            query, key, value, schedule, schedule.own[0], scoring, backend
        )
        return part.transpose(0, 1).flatten(1, 2), part_lse.transpose(0, 1).flatten(1, 2)
    num_heads, num_tokens, _ = query.shape
    sum_dtype = accumulate_dtype(query.dtype)
    dtype = sum_dtype if schedule.inherited else query.dtype
    out = query.new_empty(num_tokens, num_heads, value.shape[-1], dtype=dtype).transpose(0, 1)
    lse = query.new_empty(num_heads, num_tokens, dtype=sum_dtype)
    for region in schedule.own:
        part, part_lse = _region_forward(query, key, value, schedule, region, scoring, backend)
        _queries(out, region).copy_(part)
        _queries(lse, region).copy_(part_lse)
    for region in schedule.inherited:
        if _is_out_of_sight(schedule, region, scoring):
            continue
        part, part_lse = _region_forward(query, key, value, schedule, region, scoring, backend)
        rows, rows_lse = _queries(out, region), _queries(lse, region)
        # exp(part_lse - merged) of merged = logaddexp(rows_lse, part_lse)
        rows.lerp_(part.to(dtype), torch.sigmoid(part_lse - rows_lse).unsqueeze(-1))
        rows_lse.copy_(torch.logaddexp(rows_lse, part_lse))
    return out, lse


def _blockwise_layout(*tensors: Tensor) -> tuple[Tensor, ...]:
    """One head size and a contiguous last dimension, as the blockwise kernel assumes unchecked.

    Zero-padding a head changes no score and only adds empty output columns.
    """
    size = max(x.shape[-1] for x in tensors)
    padded = (F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in padded)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    schedule: PrefixSchedule,
    scoring: Scoring,
    backend: str,
) -> tuple[Tensor, Tensor]:
    value_size = value.shape[-1]
    if backend == "cpu" and can_run_native(query, schedule, scoring.window, scoring.softcap):
        out, lse = native_forward(query, key, value, schedule, scoring.scale)
    else:
        if backend == "cpu":
            query, key, value = _blockwise_layout(query, key, value)
        out, lse = _forward_regions(query, key, value, schedule, scoring, backend)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    # Tokens outermost: what a model's output projection reads next.
    out = out[..., :value_size].transpose(0, 1).to(query.dtype).contiguous()
    return out.transpose(0, 1), lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: PrefixSchedule,
    scoring: Scoring,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "cpu" and can_run_native(query, schedule, scoring.window, scoring.softcap):
        return native_backward(grad_out, query, key, value, out, lse, schedule, scoring.scale)
    head_size, value_size, dtype = query.shape[-1], value.shape[-1], query.dtype
    if backend == "cpu":
        query, key, value, out, grad_out = _blockwise_layout(query, key, value, out, grad_out)
    sum_dtype = accumulate_dtype(dtype) if schedule.inherited else dtype
    grads = [
        x.new_empty(x.shape[1], x.shape[0], x.shape[2], dtype=sum_dtype).transpose(0, 1)
        for x in (query, key, value)
    ]
    tensors = (grad_out, query, key, value, out, lse)
    for run in schedule.own:
        for region in run.split(copies_per_backward(run.query_length, query.shape[0])):
            parts = _region_backward(tensors, schedule, region, scoring, backend)
            for grad, part in zip(grads, parts, strict=True):
                _queries(grad, region).copy_(part)
    for region in schedule.inherited:
        if _is_out_of_sight(schedule, region, scoring):
            continue
        d_query, d_key, d_value = _region_backward(tensors, schedule, region, scoring, backend)
        _queries(grads[0], region).add_(d_query)
        _keys(grads[1], region).add_(d_key)
        _keys(grads[2], region).add_(d_value)
    sizes = (head_size, head_size, value_size)
    grad_query, grad_key, grad_value = (
        grad[..., :size].transpose(0, 1).to(dtype).contiguous().transpose(0, 1)
        for grad, size in zip(grads, sizes, strict=True)
    )
    return grad_query, grad_key, grad_value
