"""The optimizers that trainers make, for parameters without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpost_kernels import AdamW8bit

__all__ = ["make_optimizer"]


def make_optimizer(name: str, parameters: list[Tensor]) -> Any:
    """The optimizer `name` of `request.OPTIMIZERS`: "adamw" is PyTorch's fused one."""
    if name == "adamw_8bit":
        return AdamW8bit(parameters, lr=1e-5)
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)
