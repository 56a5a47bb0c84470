"""Sums of per-row values over sequences, and what a gradient of the sums is to each row.

    sum_s = sum_{i in s} weight_i value[place_i]
    d L / d value_m = sum_{i: place_i = m} weight_i (d L / d sum_{sequence of i})

Sequences are cut out of a list of N places by `cu_seqlens`; `places` says whose row stands at each,
so that sequences may share rows. Sums run in float64 and in a fixed order, on GPUs too.
Legend: M rows, N places, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Sequences"]


class Sequences:
    """Raises ValueError where `cu_seqlens` or `places` point outside; that read waits for the
    device once."""

    def __init__(
        self,
        cu_seqlens: Tensor,  # [S + 1]
        places: Tensor | None,  # [N] int64, None: place i is row i
        weights: Tensor | None,  # [N], None: all 1
        rows: int,
    ) -> None:
        self.cu_seqlens, self.weights = cu_seqlens.long(), weights
        self.places = None if places is None else places.long()
        self.rows = rows
        self.count = rows if places is None else places.shape[0]
        self.lengths = self.cu_seqlens.diff()
        self._check()

    def _check(self) -> None:
        ends = torch.stack([self.cu_seqlens[0], self.cu_seqlens[-1]])
        shrinks = (self.lengths < 0).any()
        outside = torch.zeros_like(shrinks)
        if self.places is not None:
            outside = ((self.places < 0) | (self.places >= self.rows)).any()
        first, last, shrinks_now, outside_now = torch.cat(
            [ends, torch.stack([shrinks, outside])]
        ).tolist()
        if first != 0 or last != self.count or shrinks_now:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of places, {self.count}, got "
                f"{self.cu_seqlens.tolist()}; it is the cumulative sum of the sequences' lengths "
                "with a 0 in front"
            )
        if outside_now:
            raise ValueError(f"places must be rows, 0 <= place < {self.rows}, got others")

    def _at_places(self, values: Tensor) -> Tensor:
        return values if self.places is None else values[self.places]

    def sums(self, values: Tensor) -> Tensor:
        """[M] -> [S] in the dtype of `values`; 0 for an empty sequence."""
        here = self._at_places(values).double()
        if self.weights is not None:
            here = here * self.weights
        return _segment_sums(here, self.cu_seqlens).to(values.dtype)

    def counts(self, counted: Tensor) -> Tensor:
        """[M] bool -> [S] int64: how many places of each sequence are True."""
        return _segment_sums(self._at_places(counted).double(), self.cu_seqlens).long()

    def spread(self, grads: Tensor) -> Tensor:
        """[S], gradients of `sums` -> [M], gradients of its values."""
        here = grads.repeat_interleave(self.lengths, output_size=self.count)
        if self.weights is not None:
            here = here * self.weights
        if self.places is None:
            return here.to(grads.dtype)
        by_row, order = self.places.sort(stable=True)
        rows = torch.arange(self.rows + 1, device=grads.device)
        return _segment_sums(here.double()[order], torch.searchsorted(by_row, rows)).to(grads.dtype)


def _segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)
