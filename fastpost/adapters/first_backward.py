"""After the first backward: which trained tensors of an adapter got no finite gradient."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["tensors_without_gradient"]


def tensors_without_gradient(model: nn.Module) -> list[str]:
    """Names of parameters that require a gradient and have none, or one that is not finite.

    One read of the device for all of them. Sharded gradients count as a whole.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = [name for name, p in trained if p.grad is None]
    held = [(name, p.grad) for name, p in trained if p.grad is not None]
    if held:
        sound = [grad.isfinite().all() for _, grad in held]
        flat = torch.stack([getattr(flag, "full_tensor", lambda f=flag: f)() for flag in sound])
        found += [name for (name, _), ok in zip(held, flat.tolist(), strict=True) if not ok]
    return found
