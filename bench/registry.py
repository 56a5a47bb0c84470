"""The kernels, ours and their peers': the one table that everything reads.

The rows stand in `bench.static`: `kernel_row` says what a row is, each `kernels_*` file holds those
of one kind of op of ours, each `peers_*` file those of other packages. A new kernel is a row in
such a file; a new file is a line here.

Peers without Triton are not listed: Liger's preference losses and FlexAttention are made by
torch.compile on a GPU, FlashAttention is CUDA, and of torchao 0.18 the NF4 tensor is plain torch,
its 8-bit optimisers torch.compile's, its Triton kernels those of other formats (int8, fp8, MX,
sparse blocks). Our RMSNorm and SwiGLU are C++ for CPUs.
"""

from __future__ import annotations

from bench.static import (
    kernels_adapters,
    kernels_attention,
    kernels_fused_fold,
    kernels_head,
    kernels_optimizer,
    peers_head,
    peers_quantised,
)
from bench.static.kernel_row import ROWS, TILE, VOCABS, WIDTHS, Case, Cost, Kernel
from bench.static.kernels_attention import KEY_HEADS, QUERY_HEADS, attention_segments

__all__ = [
    "KERNELS",
    "KEY_HEADS",
    "QUERY_HEADS",
    "ROWS",
    "TILE",
    "VOCABS",
    "WIDTHS",
    "Case",
    "Cost",
    "Kernel",
    "attention_segments",
    "find",
]

KERNELS = (
    *kernels_head.KERNELS,
    *kernels_attention.KERNELS,
    *kernels_fused_fold.KERNELS,
    *kernels_adapters.KERNELS,
    *kernels_optimizer.KERNELS,
    *peers_head.KERNELS,
    *peers_quantised.KERNELS,
)


def find(source: str) -> Kernel:
    """The row of `source`; raises KeyError."""
    return {kernel.source: kernel for kernel in KERNELS}[source]
