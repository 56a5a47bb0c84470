"""From a model folder to a chat model: what loops ask when they draw answers from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpost.chat_model.interface import Sampling
from fastpost.chat_model.local import LocalChatModel

__all__ = ["local_sampler"]


def local_sampler(
    sampling: Sampling | None = None,
    *,
    batch_size: int = 16,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
) -> Callable[[str], LocalChatModel]:
    """A sampler that loads each folder with transformers.

    Args:
        sampling: how replies are sampled.
        batch_size: conversations at once.
        dtype: of the weights that sample; "auto" takes the folder's.
        device: None takes the GPU if there is one.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def load(folder: str) -> LocalChatModel:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(chosen)
        return LocalChatModel(
            model.eval(),
            AutoTokenizer.from_pretrained(folder),
            folder,
            sampling=sampling,
            batch_size=batch_size,
        )

    return load
