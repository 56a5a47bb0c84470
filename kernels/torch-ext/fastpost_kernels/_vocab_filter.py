"""Which columns of a gradient tile are worth multiplying.

Most tokens of a vocabulary have no chance in any row of a batch: their gradients lie below what the
sums over them keep in 16 bits. Columns of a tile in which every

    |d loss / d y_iv| <= eps chain (|a_i| + |b_i|),    d loss / d z_iv = p_iv (a_i + b_i log p_iv)

are left out of the GEMMs of d hidden and d weight (and of an adapter's): exact zeros instead of
small numbers. For a loss in log-probs alone b is 0, a the row's own gradient, and the criterion
reads |[v = t] - p_v| <= eps.

Columns over all rows of the tile, not blocks of both: on real text almost every block of 128 x 256
holds a likely token, while most columns hold none (`bench/ops/bench_gradient_filtering.py`). Random
inputs say nothing about either.
Legend: m rows of a tile, n columns of a tile.
Source: gradient filtering, Wijmans et al. (arXiv:2411.09009, section 4.3), there by blocks of a
sorted vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._vocab_passes import CONST, LINEAR, LSE
from ._vocab_tiles import ALIGN, Head

__all__ = ["column_factors", "significant_columns"]

# Above this share of kept columns the dense GEMM is as fast as gathering them.
WORTH_GATHERING = 7 / 8


def column_factors(head: Head, coefs: Tensor) -> Tensor | None:
    """[m]: what row i's gradients are multiplied by to make 1 the smallest that counts; None if
    nothing is filtered. A row without gradients gets 0."""
    if head.filter_eps is None:
        return None
    # p (CONST + LINEAR z) = p ((CONST + LINEAR lse) + LINEAR log p)
    unit = (coefs[CONST] + coefs[LINEAR] * coefs[LSE]).abs() + coefs[LINEAR].abs()
    unit = unit * (head.filter_eps * head.transform.chain)
    return torch.where(unit > 0, unit.reciprocal(), 0.0)


def significant_columns(head: Head, tile: Tensor, factors: Tensor) -> Tensor | None:
    """Indices of the columns of `tile` [m, n] to multiply, None if that is all of them.

    Their number is read back from the device. It is rounded up to ALIGN, with columns that could
    have been left out: GEMMs want aligned shapes, and more columns are only more exact.
    """
    marks = head.passes.significant(tile, factors)
    cols = tile.shape[1]
    count = max(1, -(-int(marks.sum()) // ALIGN)) * ALIGN
    if count > WORTH_GATHERING * cols:
        return None
    order = torch.argsort(marks.to(torch.uint8), descending=True, stable=True)
    return order[:count].sort().values
