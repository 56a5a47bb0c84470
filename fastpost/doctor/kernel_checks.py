"""Every kernel on one device against the float64 reference: values, gradients, memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .adapter_checks import adapter_checks
from .attention_checks import attention_checks
from .head_checks import head_checks
from .kernel_check import CheckResult, Sizes, carry_out
from .layer_checks import layer_checks
from .nf4_checks import nf4_checks
from .optimizer_checks import optimizer_checks

__all__ = ["ON_GPU", "CheckResult", "Sizes", "run_checks"]

DTYPES = (torch.float32, torch.bfloat16)
ON_GPU = Sizes(
    rows=197,
    width=256,
    vocab=5003,
    memory_budget=1 << 20,
    head_sizes=(64, 96, 128, 192, 256),
    heads=(4, 2),
    # A tree of depth 3 with siblings, a segment of one token, and a root of its own.
    segments=(
        (0, 150, 301),
        (150, 230, 280),
        (230, 231, 280),
        (231, 280, 280),
        (280, 301, 301),
        (301, 389, 389),
    ),
    window=70,
)


def run_checks(
    device: str | torch.device, sizes: Sizes = ON_GPU, *, backend: str = "auto"
) -> Iterator[CheckResult]:
    """Yields one result a check, as each is done.

    Args:
        device: where the kernels run.
        sizes: shapes; the default is for GPUs.
        backend: as in the kernels; "triton" on "cpu" needs TRITON_INTERPRET=1.
    """
    # "auto" leaves the product to the library: the kernel that does all of it is asked for by name.
    is_gpu = torch.device(device).type == "cuda"
    backends = dict.fromkeys((backend, "triton" if is_gpu else backend))
    for dtype in DTYPES:
        for checks in (
            head_checks(dtype, sizes, backend),
            attention_checks(dtype, sizes, backend),
            layer_checks(dtype, sizes),
            *(adapter_checks(dtype, sizes, name) for name in backends),
            nf4_checks(dtype, sizes, backend),
            optimizer_checks(dtype, sizes, backend),
        ):
            for check in checks:
                yield carry_out(check, torch.device(device))
