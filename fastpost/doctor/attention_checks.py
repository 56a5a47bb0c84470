"""Checks of attention over packed segments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastpost_kernels import prefix_attention, reference

from .kernel_check import Check, Sizes

__all__ = ["attention_checks"]


def attention_checks(dtype: torch.dtype, sizes: Sizes, backend: str) -> Iterator[Check]:
    segments = torch.tensor(sizes.segments)
    tokens = int(segments[-1, 1])
    query_heads, key_heads = sizes.heads
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "window, softcap, sinks": {"window": sizes.window, "softcap": 4.0},
    }
    for head_size in sizes.head_sizes:
        for form, options in forms.items():
            generator = torch.Generator().manual_seed(head_size)
            heads = {"query": query_heads, "key": key_heads, "value": key_heads}
            tensors = {
                name: torch.randn(tokens, count, head_size, generator=generator)
                .to(dtype)
                .transpose(0, 1)
                for name, count in heads.items()
            }
            if options:
                tensors["sinks"] = torch.randn(query_heads, generator=generator).to(dtype)

            def attend(options: Any = options, **given: Any) -> dict[str, Tensor]:
                out = prefix_attention(segments=segments, **given, **options, backend=backend)
                return {"out": out}

            def truly_attend(options: Any = options, **given: Any) -> dict[str, Tensor]:
                return {"out": reference.prefix_attention(segments=segments, **given, **options)}

            yield Check(
                "prefix_attention",
                form,
                dtype,
                f"Hq={query_heads} Hk={key_heads} N={tokens} D={head_size}",
                tensors,
                tuple(tensors),
                attend,
                truly_attend,
                ("out",),
            )
