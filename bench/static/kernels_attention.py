"""Attention over packed segments."""

from __future__ import annotations

from functools import lru_cache, partial
from unittest import mock

import torch
from torch import Tensor

from bench.static.kernel_row import MAX_TOKENS, Arguments, Case, Cost, Kernel, floats, meta

__all__ = ["KERNELS", "KEY_HEADS", "QUERY_HEADS", "attention_segments"]

ATTENTION = "fastpost_kernels._prefix_kernels"
HEAD_SIZES = (128, 64, 96, 192, 256, (192, 128))  # the last: of queries and values in DeepSeek-V3
# The tables hold indices of tokens and of ranges of keys; a segment has more than one range only
# below a parent that it does not touch.
LIMITS = {"program_id(0)": MAX_TOKENS, "blocks_ptr": 4 * MAX_TOKENS, "ranges_ptr": MAX_TOKENS}
QUERY_HEADS, KEY_HEADS = 32, 8
PROMPT, ANSWERS, ANSWER = 4096, 8, 512


@lru_cache
def attention_segments() -> Tensor:
    """A prompt of 4,096 tokens with 8 answers of 512: 8,192 unique tokens."""
    end = PROMPT + ANSWERS * ANSWER
    answers = [(first, first + ANSWER, first + ANSWER) for first in range(PROMPT, end, ANSWER)]
    return torch.tensor([(0, PROMPT, end), *answers])


def _attention_cost(args: Arguments, products: tuple[int, int], reads: str) -> Cost:
    """`products` of a visible pair along D and along Dv; `reads` names pointers, `x_ptr` by x."""
    from fastpost_kernels._prefix_segments import schedule_of

    heads, tokens, size = args["query_ptr"].shape
    pairs = schedule_of(attention_segments(), tokens).num_pairs(args["window"] or None) * heads
    flops = 2 * pairs * (products[0] * size + products[1] * args["value_ptr"].shape[2])
    tensors = [args[f"{name}_ptr"] for name in reads.split()]
    return Cost(flops, sum(x.numel() * x.itemsize for x in tensors), pairs)


def _forward_cost(args: Arguments) -> Cost:
    return _attention_cost(args, (1, 1), "query key value out lse")


def _grad_query_cost(args: Arguments) -> Cost:
    return _attention_cost(args, (2, 1), "query key value grad_out lse delta grad_query")


def _grad_key_cost(args: Arguments) -> Cost:
    """Both gradients share q·k; only that of the key needs dO·v."""
    key, value = args["NEEDS_KEY"], args["NEEDS_VALUE"]
    written = " grad_key" * key + " grad_value" * value
    products = (1 + key, key + value)
    return _attention_cost(args, products, "query key value grad_out lse delta" + written)


def _attention(
    size: int, value_size: int, everything: bool, backward: bool, capability: int
) -> None:
    from fastpost_kernels import _prefix_triton as host
    from fastpost_kernels._prefix_regions import Scoring
    from fastpost_kernels._prefix_segments import schedule_of

    schedule = schedule_of(attention_segments(), PROMPT + ANSWERS * ANSWER)
    scoring = Scoring(size**-0.5, 1024 if everything else None, 50.0 if everything else None)
    tokens = int(attention_segments()[0, 2])
    query, key, value, out = (
        meta(tokens, heads, columns).transpose(0, 1)
        for heads, columns in (
            (QUERY_HEADS, size),
            (KEY_HEADS, size),
            (KEY_HEADS, value_size),
            (QUERY_HEADS, value_size),
        )
    )
    sinks = meta(QUERY_HEADS) if everything else None
    # Tensors on the meta device have no capability to ask for.
    with mock.patch.object(host, "capability", lambda device: capability):
        if backward:
            lse = floats(*query.shape[:2])
            host.backward_triton(out, query, key, value, out, lse, schedule, scoring)
        else:
            host.forward_triton(query, key, value, sinks, schedule, scoring)


def _attention_cases(backward: bool) -> tuple[Case, ...]:
    cases = []
    for chosen in HEAD_SIZES:
        size, value_size = chosen if isinstance(chosen, tuple) else (chosen, chosen)
        name = f"D {size}" + f", Dv {value_size}" * (size != value_size)
        for everything in (False, True):
            shape = name + ", softcap and window" * everything
            cases.append(Case(shape, partial(_attention, size, value_size, everything, backward)))
    return tuple(cases)


KERNELS = (
    Kernel(
        "prefix_attention", "fastpost", f"{ATTENTION}:prefix_attention_fwd_kernel", True,
        _forward_cost, _attention_cases(False), limits=LIMITS,
    ),
    Kernel(
        "prefix_attention", "fastpost", f"{ATTENTION}:prefix_attention_bwd_query_kernel", True,
        _grad_query_cost, _attention_cases(True), limits=LIMITS,
    ),
    Kernel(
        "prefix_attention", "fastpost", f"{ATTENTION}:prefix_attention_bwd_key_kernel", True,
        _grad_key_cost, _attention_cases(True), limits=LIMITS,
    ),
)  # fmt: skip
