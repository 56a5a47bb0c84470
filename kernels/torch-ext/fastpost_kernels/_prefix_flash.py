"""prefix_attention through an attention kernel for sequences laid end to end, such as flash-attn's.

The calls are those of `_prefix_flash_calls`. Their partial results merge by log-sum-exp, in fp32;
the backward hands every call the merged output and log-sum-exp, which makes its gradients exact
shares (see `_prefix_regions`), and adds them up in fp32 in a fixed order: the same bits each time.

Unlike our Triton kernels this copies: the queries and keys of a call are gathered unless they are
one range of tokens, as with one prompt, and partial results are written and read again.
Shapes here: [N, H, D], tokens outermost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _flash_varlen
from ._prefix_flash_calls import placed_calls
from ._prefix_regions import Scoring, accumulate_dtype, with_sinks
from ._prefix_segments import PrefixSchedule

__all__ = ["backward_flash", "forward_flash"]


def forward_flash(
    query: Tensor,  # [Hq, N, D]
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    schedule: PrefixSchedule,
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Returns (out [Hq, N, Dv], lse [Hq, N] fp32, sinks included)."""
    kernel = _flash_varlen.varlen_kernel()
    q, k, v = _kernel_layout(query, key, value)
    dtype = _sum_dtype(query, schedule)
    out = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty(query.shape[:2], dtype=accumulate_dtype(query.dtype))
    for call in placed_calls(schedule, scoring.window, query.device):
        part, part_lse = kernel.forward(
            q[call.queries], k[call.keys], v[call.keys],
            call.layout, scoring.scale, scoring.softcap,
        )  # fmt: skip
        if call.layout.right == 0:  # segments against themselves, before all else
            out[call.queries], lse[:, call.queries] = part, part_lse
        else:
            _merge(out, lse, call.queries, part.to(dtype), part_lse)
    out = out.transpose(0, 1)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    out = out[..., : value.shape[2]].transpose(0, 1).to(query.dtype).contiguous()
    return out.transpose(0, 1), lse


def backward_flash(
    grad_out: Tensor,  # [Hq, N, Dv]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: PrefixSchedule,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dQ, dK, dV)."""
    kernel = _flash_varlen.varlen_kernel()
    d, q, k, v, o = _kernel_layout(grad_out, query, key, value, out)
    dtype = _sum_dtype(query, schedule)
    sums = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v)]
    for call in placed_calls(schedule, scoring.window, query.device):
        parts = kernel.backward(
            d[call.queries], q[call.queries], k[call.keys], v[call.keys], o[call.queries],
            lse[:, call.queries].contiguous(), call.layout, scoring.scale, scoring.softcap,
        )  # fmt: skip
        for total, part, tokens in zip(
            sums, parts, (call.queries, call.keys, call.keys), strict=True
        ):
            _add(total, tokens, part)
    grads = [
        total[..., : x.shape[2]].to(x.dtype).contiguous().transpose(0, 1)
        for total, x in zip(sums, (query, key, value), strict=True)
    ]
    return grads[0], grads[1], grads[2]


def _sum_dtype(query: Tensor, schedule: PrefixSchedule) -> torch.dtype:
    """Without shared prefixes every entry is written by one call: nothing is summed."""
    return accumulate_dtype(query.dtype) if schedule.inherited else query.dtype


def _kernel_layout(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[N, H, D] views, D padded by zeros to one multiple of 8: no score and no output changes."""
    size = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    padded = (F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in tensors)
    return tuple((x if _is_aligned(x) else x.contiguous()).transpose(0, 1) for x in padded)


def _is_aligned(x: Tensor) -> bool:
    """Whether rows can be read 8 elements at a time; their size is a multiple of 8."""
    return x.stride(-1) == 1 and all(n % 8 == 0 for n in (*x.stride()[:-1], x.storage_offset()))


def _merge(
    out: Tensor, lse: Tensor, tokens: slice | Tensor, part: Tensor, part_lse: Tensor
) -> None:
    """Takes a further part of the keys of `tokens` in; both are of disjoint keys."""
    before, before_lse = out[tokens], lse[:, tokens]
    # exp(part_lse - merged) of merged = logaddexp(before_lse, part_lse)
    weight = torch.sigmoid(part_lse - before_lse).transpose(0, 1).unsqueeze(-1)
    before.lerp_(part, weight)
    if not isinstance(tokens, slice):  # then it was a copy
        out[tokens] = before
    lse[:, tokens] = torch.logaddexp(before_lse, part_lse)


def _add(total: Tensor, tokens: slice | Tensor, part: Tensor) -> None:
    """Adds rows; `index_put_` sorts what meets in one row, where `index_add_` would race."""
    if isinstance(tokens, slice):
        total[tokens] += part
    else:
        total.index_put_((tokens,), part.to(total.dtype), accumulate=True)
