"""The contract of the tile passes of linear_logprob, and their plain-torch version.

A tile is a block of logits y = h W^T, [rows, cols], as the GEMM left it. Everything that is not a
GEMM is one of four passes over it, written three times with the same signatures: here in torch, in
`_vocab_passes_triton.py` and, through `_vocab_passes_cpp.py`, in `csrc/linear_logprob.cpp`.

    fold        merge a tile into the running row statistics; optionally replace it by exp(z - ref)
    gradient    replace a tile by d loss / d y
    significant which columns of a gradient tile hold anything to multiply
    multiply_accumulate   acc = acc * rescale[row] + a @ b, in the statistics' dtype

Row statistics are a matrix `state` [9, M]. The target's own logit is computed apart, as a dot
product in fp32: it is the first `ref`, fold leaves the target's column out, and its term joins the
sums at the end. So the rounding of 16-bit logits never reaches the log-prob of the target, and
1 - p(target) keeps its digits near p = 1.
`ref` follows the running maximum only when it lags by more than 30: exponentials are relative to
`ref`, so nothing is lost, nothing overflows, and accumulators are almost never rescaled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["COEF_ROWS", "STATE_ROWS", "LogitTransform"]

# Rows of `state`; the C++ and Triton passes use the same numbers. Sums run over the vocabulary
# except the target, with e_v = exp(z_v - ref): SUM e, XSUM e (z - ref), SQUARES e^2, ZSUM z. TOP_*:
# the target's logit and the maxima before and after it, all as the tiles hold them, so that ties
# compare equal.
REF, SUM, XSUM, SQUARES, ZSUM, TOP_SELF, TOP_BEFORE, TOP_AFTER, RESCALE = range(9)
STATE_ROWS = 9

# Rows of `coefs`: d loss / d y_v = slope_v (p_v (CONST + LINEAR z_v) + UNIFORM), but TARGET at the
# target's column.
LSE, CONST, LINEAR, UNIFORM, TARGET = range(5)
COEF_ROWS = 5

MAX_LAG = 30.0
# The torch pass works on this many elements at a time, so its temporaries stay small and in cache.
BLOCK_ELEMENTS = 1 << 18


class LogitTransform(NamedTuple):
    """z = softcap * tanh(logit_scale * y / softcap) / temperature; no cap if `softcap` is None."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """z and dz/dy without the constant factor `chain`, both shaped like `y`."""
        y = y * self.logit_scale
        if self.softcap is None:
            return y / self.temperature, torch.ones_like(y)
        # 4u / (1 + u)^2 with u = e^(-2|x|) is 1 - tanh(x)^2 without its cancellation.
        x = y / self.softcap
        u = torch.exp(-2 * x.abs())
        return torch.tanh(x) * (self.softcap / self.temperature), 4 * u / (1 + u).square()

    @property
    def chain(self) -> float:
        """The constant factor of dz/dy."""
        return self.logit_scale / self.temperature


def blocks(rows: int, cols: int) -> range:
    """Starts of row blocks of about BLOCK_ELEMENTS elements; the step is `.step`."""
    return range(0, rows, max(1, BLOCK_ELEMENTS // max(1, cols)))


def fold(
    tile: Tensor,  # [m, n], overwritten if store_exp
    state: Tensor,  # [9, m], updated
    targets: Tensor,  # [m] int64
    first_col: int,
    bias: Tensor | None,  # [n], dtype of state
    transform: LogitTransform,
    *,
    moments: bool,
    top1: bool,
    store_exp: bool,
) -> None:
    """Merge columns [first_col, first_col + n) into `state`.

    `moments` updates XSUM, SQUARES and ZSUM, `top1` the TOP rows. With `store_exp` the tile becomes
    exp(z - ref) * slope, zero at the target, and RESCALE the factor that old accumulators need.
    """
    rows, cols = tile.shape
    columns = torch.arange(cols, device=tile.device)
    starts = blocks(rows, cols)
    for start in starts:
        part = slice(start, min(start + starts.step, rows))
        s = state[:, part]
        local = (targets[part] - first_col)[:, None]
        y = tile[part].to(state.dtype)
        if bias is not None:
            y = y + bias  # not in place: `y` may be the tile itself, which fold must keep
        is_target = columns == local
        if top1:
            _fold_top1(y, s, columns, local, is_target)
        z, slope = transform.apply(y)
        zmax = z.masked_fill(is_target, -torch.inf).amax(1)
        ref = torch.where(zmax - s[REF] > MAX_LAG, zmax, s[REF])
        moved = torch.where(ref == s[REF], 0.0, s[REF] - ref)
        rescale = moved.exp()
        d = z - ref[:, None]
        e = d.exp().masked_fill_(is_target, 0.0)
        if moments:
            s[XSUM] = (s[XSUM] + moved * s[SUM]) * rescale
            s[XSUM] += (e * d.masked_fill_(e == 0, 0.0)).sum(1)
            s[SQUARES] = s[SQUARES] * rescale.square() + e.square().sum(1)
            s[ZSUM] += z.masked_fill(is_target, 0.0).sum(1)
        s[SUM] = s[SUM] * rescale + e.sum(1)
        # A NaN reference stays: it compares false everywhere above and reaches every result.
        s[REF] = ref
        s[RESCALE] = rescale
        if store_exp:
            tile[part] = e.mul_(slope)


def _fold_top1(y: Tensor, s: Tensor, columns: Tensor, local: Tensor, is_target: Tensor) -> None:
    inside = is_target.any(1)
    self_logit = y.masked_fill(~is_target, 0.0).sum(1)
    s[TOP_SELF] = torch.where(inside, self_logit, s[TOP_SELF])
    before = y.masked_fill(columns >= local, -torch.inf).amax(1)
    after = y.masked_fill(columns <= local, -torch.inf).amax(1)
    s[TOP_BEFORE] = torch.maximum(s[TOP_BEFORE], before)
    s[TOP_AFTER] = torch.maximum(s[TOP_AFTER], after)


def gradient(
    tile: Tensor,  # [m, n], overwritten
    coefs: Tensor,  # [5, m]
    targets: Tensor,  # [m]
    first_col: int,
    bias: Tensor | None,  # [n]
    transform: LogitTransform,
) -> None:
    """Replace logits by d loss / d y as the rows of `coefs` say."""
    rows, cols = tile.shape
    columns = torch.arange(cols, device=tile.device)
    starts = blocks(rows, cols)
    for start in starts:
        part = slice(start, min(start + starts.step, rows))
        c = coefs[:, part, None]
        y = tile[part].to(coefs.dtype)
        if bias is not None:
            y = y + bias  # not in place: `y` may be the tile itself, which fold must keep
        z, slope = transform.apply(y)
        p = (z - c[LSE]).exp_()
        g = p.mul_(c[CONST] + c[LINEAR] * z).add_(c[UNIFORM]).mul_(slope).mul_(transform.chain)
        is_target = columns == (targets[part] - first_col)[:, None]
        tile[part] = torch.where(is_target, c[TARGET], g)


def significant(
    tile: Tensor,  # [m, n] gradients
    factors: Tensor,  # [m]
) -> Tensor:
    """[n] bool: whether some row i has |tile_iv| factors_i > 1, or a NaN."""
    rows, cols = tile.shape
    peaks = tile.new_zeros(cols)
    factors = factors.to(tile.dtype)
    starts = blocks(rows, cols)
    for start in starts:
        part = slice(start, start + starts.step)
        block = (tile[part] * factors[part, None]).abs_().amax(0)
        torch.maximum(peaks, block, out=peaks)
    return ~(peaks <= 1)


def multiply_accumulate(
    acc: Tensor,  # [m, n], dtype of the statistics
    a: Tensor,  # [m, k]
    b: Tensor,  # [k, n]
    scratch: Tensor | None,  # [m, n] in the GEMM's dtype where it differs from acc's
    rescale: Tensor | None = None,  # [m]
) -> None:
    """acc = acc * rescale[:, None] + a @ b.

    Where `scratch` is given the product is rounded to its dtype once per call and summed in acc's:
    CPU GEMMs cannot write fp32 from 16-bit operands.
    """
    if rescale is not None:
        acc.mul_(rescale[:, None])
    if scratch is None:
        torch.addmm(acc, a, b, out=acc)
    else:
        torch.mm(a, b, out=scratch)
        starts = blocks(*acc.shape)
        for start in starts:
            acc[start : start + starts.step] += scratch[start : start + starts.step]
