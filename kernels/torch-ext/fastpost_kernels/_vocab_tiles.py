"""The one body of linear_logprob and linear_cross_entropy: walks over vocabulary tiles.

Logits only ever exist as one reused tile, filled by a GEMM and consumed by the passes of
`_vocab_passes.py`. Two walks:

    fold_rows            rows outer, vocabulary inner: statistics, and a frozen head's gradient
    recompute_gradients  in `_vocab_gradients.py`: vocabulary outer, rows inner

Legend: M rows, m scored rows or a chunk of them, H hidden, V vocabulary, n columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import _vocab_passes as passes_torch
from . import _vocab_passes_cpp as passes_cpp
from ._choices import choose, head_shape
from ._csrc import advise_huge_pages
from ._device import HAS_TRITON
from ._lora_head import LoraHead, LowRankRows
from ._vocab_passes import (
    REF,
    RESCALE,
    SQUARES,
    STATE_ROWS,
    SUM,
    TOP_AFTER,
    TOP_BEFORE,
    TOP_SELF,
    XSUM,
    ZSUM,
    LogitTransform,
    blocks,
)

if HAS_TRITON:
    from . import _fused_fold_triton as fused_fold
    from . import _vocab_passes_triton as passes_triton

IGNORE = -100
# A tile is at most this wide: 4096 x 4096 in 16 bits is an L2 cache, and the widest that a Triton
# program folds in registers.
TILE_COLS = 4096
TILE_ROWS = 4096
MIN_COLS = 512
ALIGN = 64
DEFAULT_BUDGET = {"cpu": 128 << 20}
DEFAULT_BUDGET_GPU = 512 << 20


class Head(NamedTuple):
    """The arguments that every walk needs; `compute_dtype` is what the GEMMs multiply."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    targets: Tensor  # [M]
    transform: LogitTransform
    backend: str  # "triton", "cpp" or "torch"
    compute_dtype: torch.dtype
    budget: int  # bytes
    lora: LoraHead | None = None
    filter_eps: float | None = None  # see `_vocab_filter.py`

    @property
    def stats_dtype(self) -> torch.dtype:
        return statistics_dtype(self.compute_dtype)

    @property
    def passes(self) -> ModuleType:
        if self.backend == "triton":
            return passes_triton
        return passes_cpp if self.backend == "cpp" else passes_torch

    @property
    def needs_scratch(self) -> bool:
        """Whether a product must be rounded before it is added to an fp32 accumulator."""
        return self.compute_dtype != self.stats_dtype and self.hidden.device.type != "cuda"

    def stats(self, *shape: int) -> Tensor:
        """Zeros in the statistics' dtype."""
        fresh = self.hidden.new_empty(shape, dtype=self.stats_dtype)
        return advise_huge_pages(fresh).zero_()

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised buffer in the GEMMs' dtype."""
        return advise_huge_pages(self.hidden.new_empty(shape, dtype=self.compute_dtype))


def statistics_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Statistics and accumulators: float32, or float64 for float64 inputs."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def default_budget(device_type: str) -> int:
    """Bytes of tile buffers when `memory_budget` is None: 128 MiB on CPU, 512 MiB elsewhere."""
    return DEFAULT_BUDGET.get(device_type, DEFAULT_BUDGET_GPU)


def tile_shape(
    rows: int,
    vocab: int,
    row_bytes: int,
    itemsize: int,
    budget: int,
    most_cols: int | None = None,  # None is TILE_COLS
) -> tuple[int, int]:
    """(rows, columns) of the tile: as many rows as the budget allows, for the weight is read once
    per row chunk; columns shrink to MIN_COLS before rows are split. `row_bytes` is what a row costs
    besides its tile."""
    cols = min(most_cols or TILE_COLS, -(-vocab // ALIGN) * ALIGN)
    rows = max(1, rows)
    fitting = (budget // rows - row_bytes) // itemsize // ALIGN * ALIGN
    cols = min(cols, max(fitting, MIN_COLS))
    return max(1, min(rows, budget // (cols * itemsize + row_bytes))), cols


class ScoredRows:
    """Which rows are scored. Reading their number waits for the device once; the same read checks
    the targets, so a bad one is always an error and never a silent wrong row."""

    def __init__(self, targets: Tensor, vocab: int) -> None:
        scored = targets != IGNORE
        bad = scored & ((targets < 0) | (targets >= vocab))
        self.total = targets.shape[0]
        self.count, num_bad = torch.stack([scored.sum(), bad.sum()]).tolist()
        if num_bad:
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"targets[{row}] = {int(targets[row])} ({num_bad} such rows): expected "
                f"0 <= target < {vocab} (the vocabulary), or {IGNORE} for a row that is not scored"
            )
        self.index = None if self.count == self.total else scored.nonzero().squeeze(1)

    def take(self, x: Tensor, start: int, end: int) -> Tensor:
        """Scored rows [start, end) of x [M, ...]: a view if every row is scored."""
        return x[start:end] if self.index is None else x[self.index[start:end]]

    def put(self, out: Tensor, start: int, end: int, values: Tensor) -> None:
        """The reverse of `take`, into `out` [M, ...]."""
        if self.index is None:
            out[start:end] = values
        else:
            out[self.index[start:end]] = values.to(out.dtype)

    def chunks(self, size: int) -> Iterator[tuple[int, int]]:
        for start in range(0, self.count, size):
            yield start, min(start + size, self.count)


class WeightTiles:
    """Slices of the weight in the GEMM's dtype, cast one tile at a time; beside them the bias and
    an adapter's B, cast as a whole."""

    def __init__(self, head: Head, cols: int) -> None:
        self.weight, self.cols = head.weight, cols
        same = head.weight.dtype == head.compute_dtype
        self.cast = None if same else head.empty(cols, head.weight.shape[1])
        self.bias = None if head.bias is None else head.bias.to(head.stats_dtype).contiguous()
        self.lora_b = None if head.lora is None else head.lora.b.to(head.compute_dtype)

    def spans(self) -> Iterator[tuple[int, int]]:
        vocab = self.weight.shape[0]
        for first in range(0, vocab, self.cols):
            yield first, min(first + self.cols, vocab)

    def slice(self, first: int, last: int) -> Tensor:
        if self.cast is None:
            return self.weight[first:last]
        return self.cast[: last - first].copy_(self.weight[first:last])

    def bias_slice(self, first: int, last: int) -> Tensor | None:
        return None if self.bias is None else self.bias[first:last]

    def lora_b_slice(self, first: int, last: int) -> Tensor | None:
        return None if self.lora_b is None else self.lora_b[first:last]


class TargetLogits(NamedTuple):
    """Of each scored row's own target, exact to fp32."""

    weight: Tensor  # [m, H] rows of the head
    z: Tensor  # [m]
    slope: Tensor  # [m], dz/dy with its constant factor
    lora_b: Tensor | None = None  # [m, r] rows of B


def target_logits(
    head: Head, hidden: Tensor, targets: Tensor, low_rank: LowRankRows | None = None
) -> TargetLogits:
    """h . W[target] + u . B[target] + b[target] by dot products in the statistics' dtype."""
    assert (head.lora is None) == (low_rank is None)
    weight = head.weight.index_select(0, targets).to(head.compute_dtype)
    y = head.stats(hidden.shape[0])
    starts = blocks(*hidden.shape)
    for start in starts:
        part = slice(start, start + starts.step)
        product = hidden[part].to(head.stats_dtype) * weight[part]
        torch.sum(product, 1, out=y[part])
    if head.bias is not None:
        y += head.bias.index_select(0, targets)
    lora_b = None
    if head.lora is not None and low_rank is not None:
        lora_b = head.lora.b.index_select(0, targets).to(head.compute_dtype)
        y += (low_rank.exact * lora_b).sum(1)
    z, slope = head.transform.apply(y)
    return TargetLogits(weight, z, slope * head.transform.chain, lora_b)


class RowStatistics(NamedTuple):
    """Results of a fold, each [m] in the statistics' dtype (`is_top1` bool)."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    normalizer: Tensor  # sum_v exp(z_v - ref), what the accumulator of exponentials is divided by


def start_state(head: Head, target: TargetLogits) -> Tensor:
    """The state of a row that has seen its target's logit and nothing else, [9, m]."""
    state = head.stats(STATE_ROWS, target.z.shape[0])
    state[REF] = target.z
    state[TOP_SELF : TOP_AFTER + 1] = -torch.inf
    return state


def finish_state(state: Tensor, target: TargetLogits, vocab: int) -> RowStatistics:
    """From sums over the others, and the target, to statistics; all relative to `ref`."""
    lag = target.z - state[REF]
    at_target = lag.exp()
    total = state[SUM] + at_target
    log_total = total.log()
    return RowStatistics(
        # log1p where the target is the reference: log p keeps its digits near p = 1
        logprob=torch.where(lag == 0, -state[SUM].log1p(), lag - log_total),
        logsumexp=state[REF] + log_total,
        entropy=log_total - (state[XSUM] + at_target * lag) / total,
        log_sum_sq_probs=(state[SQUARES] + at_target.square()).log() - 2 * log_total,
        mean_logits=(state[ZSUM] + target.z) / vocab,
        # the first maximum wins a tie, as in argmax
        is_top1=(state[TOP_SELF] > state[TOP_BEFORE]) & (state[TOP_SELF] >= state[TOP_AFTER]),
        normalizer=total,
    )


def fold_rows(
    head: Head,
    hidden: Tensor,  # [m, H] in compute_dtype, contiguous
    targets: Tensor,  # [m]
    tiles: WeightTiles,
    buffer: Tensor,  # [>= m, columns]; with `resident` one such tile after the other, flat
    state: Tensor,  # [9, m]
    *,
    moments: bool,
    top1: bool,
    acc: Tensor | None = None,  # [m, H]: receives sum_v exp(z_v - ref) slope_v W_v
    resident: bool = False,
    low_rank: LowRankRows | None = None,  # the adapter's side of `hidden`; its acc goes with `acc`
) -> None:
    """One pass over the vocabulary for one chunk of rows. With `resident` every tile keeps its own
    place in `buffer`, see `resident_tile`."""
    assert (head.lora is None) == (low_rank is None)
    rows = hidden.shape[0]
    if acc is None and not resident and fuses_products(head, tiles, rows):
        spans = list(tiles.spans())
        first, last = spans[0][0], spans[-1][1]
        fused_fold.fold_products(
            hidden,
            head.weight[first:last],
            state,
            targets,
            first,
            tiles.bias_slice(first, last),
            head.transform,
            buffer,
            moments=moments,
            top1=top1,
        )
        return
    factor, low_acc = (None, None) if low_rank is None else (low_rank.factor, low_rank.acc)
    scratch = head.empty(*acc.shape) if acc is not None and head.needs_scratch else None
    low_scratch = None
    if low_acc is not None and head.needs_scratch:
        low_scratch = head.empty(*low_acc.shape)
    for first, last in tiles.spans():
        weight = tiles.slice(first, last)
        lora_b = None if low_rank is None else tiles.lora_b_slice(first, last)
        if resident:
            tile = resident_tile(buffer, rows, first, last)
        else:
            tile = leading_columns(buffer[:rows], last - first)
        multiply_logits(hidden, weight, tile, factor, lora_b)
        head.passes.fold(
            tile,
            state,
            targets,
            first,
            tiles.bias_slice(first, last),
            head.transform,
            moments=moments,
            top1=top1,
            store_exp=acc is not None,
        )
        if acc is not None:
            head.passes.multiply_accumulate(acc, tile, weight, scratch, state[RESCALE])
        if low_acc is not None:
            assert acc is not None and lora_b is not None
            head.passes.multiply_accumulate(low_acc, tile, lora_b, low_scratch, state[RESCALE])


def fuses_products(head: Head, tiles: WeightTiles, rows: int) -> bool:
    """Whether one kernel multiplies and folds: only where it can and was measured faster."""
    if head.backend != "triton" or head.lora is not None or tiles.cast is not None:
        return False
    vocab, width = head.weight.shape
    if rows == 0 or vocab == 0 or head.weight.stride(1) != 1:
        return False
    shape = head_shape(rows, width, vocab, head.compute_dtype)
    return choose("head_fold", head.weight.device, shape) == "fused"


def multiply_logits(
    hidden: Tensor,  # [m, H]
    weight: Tensor,  # [n, H]
    tile: Tensor,  # [m, n], overwritten
    factor: Tensor | None = None,  # [m, r]
    lora_b: Tensor | None = None,  # [n, r]
) -> None:
    """tile = hidden weight^T + factor lora_b^T, the second as an addition to the first."""
    torch.mm(hidden, weight.t(), out=tile)
    if factor is not None and lora_b is not None:
        torch.addmm(tile, factor, lora_b.t(), out=tile)


def resident_size(rows: int, vocab: int) -> int:
    """Elements of a flat buffer that keeps every tile."""
    return rows * (-(-vocab // ALIGN) * ALIGN)


def resident_tile(buffer: Tensor, rows: int, first: int, last: int) -> Tensor:
    """The tile of columns [first, last): its rows are adjacent, as in the reused tile."""
    cols = -(-(last - first) // ALIGN) * ALIGN
    tile = buffer[rows * first : rows * (first + cols)].view(rows, cols)
    return leading_columns(tile, last - first)


def leading_columns(padded: Tensor, cols: int) -> Tensor:
    """`padded[:, :cols]` with zeros in the columns behind.

    PyTorch's 16-bit CPU GEMMs read the last columns of a row in whole blocks of 32 and multiply the
    excess by zero: a NaN left in the padding would come out as one.
    """
    padded[:, cols:].zero_()
    return padded[:, :cols]


def combine_target(
    target_weight: Tensor,  # [m, H]
    target_factor: Tensor,  # [m]
    acc: Tensor,  # [m, H]
    acc_factor: Tensor,  # [m]
) -> Tensor:
    """target_factor * W[target] + acc_factor * acc, in place in `acc`: a frozen head's gradient."""
    acc.mul_(acc_factor[:, None])
    starts = blocks(*acc.shape)
    for start in starts:
        part = slice(start, start + starts.step)
        acc[part] += target_weight[part] * target_factor[part, None]
    return acc


def gemm_rows(head: Head, x: Tensor) -> Tensor:
    """`x` as the GEMMs want it: compute dtype, rows contiguous."""
    return x.to(head.compute_dtype).contiguous()


def scatter_rows(rows: ScoredRows, values: Tensor, dtype: torch.dtype) -> Tensor:
    """[m, ...] -> [M, ...] in `dtype`, zero where a row is not scored."""
    if rows.index is None:
        return values.to(dtype)
    out = values.new_zeros((rows.total, *values.shape[1:]), dtype=dtype)
    rows.put(out, 0, rows.count, values)
    return out
