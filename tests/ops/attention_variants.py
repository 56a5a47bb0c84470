"""What Triton makes of prefix_attention's launches, in a process without the interpreter.

    python -m tests.ops.attention_variants specialisations
    python -m tests.ops.attention_variants compile CAPABILITY HEAD_SIZE VALUE_SIZE [full]

Prints one JSON object a line. `specialisations`: how many variants of each kernel forests of many
lengths in two layouts ask for. `compile`: what each variant takes on a GPU that need not be there,
with softcap and window, and if `full` also without.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from bench.static.compilation import AbsentDevice, compile_launches
from bench.static.machine_code import read_machine_code
from fastpost_kernels import _prefix_kernels as kernels
from fastpost_kernels._prefix_regions import Scoring
from fastpost_kernels._prefix_segments import schedule_of

host = importlib.import_module("fastpost_kernels._prefix_triton")

QUERY_HEADS, KEY_HEADS = 8, 2
NAMES = ("fwd", "bwd_query", "bwd_key")


def launch(
    lengths: list[int], sizes: tuple[int, int], scoring: Scoring, heads_outermost: bool = False
) -> None:
    """Forward and backward of a first segment of lengths[0] tokens with the others below it."""

    def meta(heads: int, size: int) -> Tensor:
        shape = (heads, num_tokens, size) if heads_outermost else (num_tokens, heads, size)
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return x if heads_outermost else x.transpose(0, 1)

    num_tokens = sum(lengths)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [(end - n, end, end) for end, n in zip(ends, lengths, strict=True)]
    segments = torch.tensor([(0, lengths[0], num_tokens), *rows[1:]])
    schedule = schedule_of(segments, num_tokens)
    inputs = meta(QUERY_HEADS, sizes[0]), meta(KEY_HEADS, sizes[0]), meta(KEY_HEADS, sizes[1])
    out, lse = host.forward_triton(*inputs, None, schedule, scoring)
    host.backward_triton(out, *inputs, out, lse, schedule, scoring)


def specialisations() -> None:
    keys: set[tuple[str, str]] = set()
    driver.set_active(AbsentDevice(GPUTarget("cuda", 90, 32)))
    forests = [[1], [2], [16], [7, 9], [16, 16, 32], [4096, 512, 500], [5, 4, 3, 2, 1], [1009]]
    with (
        mock.patch.object(
            JITFunction, "_do_compile", lambda self, key, *_: keys.add((self.__name__, key))
        ),
        mock.patch.object(host, "capability", lambda device: 90),
    ):
        for lengths in forests:
            for heads_outermost in (False, True):
                launch(lengths, (128, 128), Scoring(0.1, 1023, 30.0), heads_outermost)
    print(json.dumps(Counter(name for name, _ in keys)))


def compile_variants(capability: int, sizes: tuple[int, int], full: bool) -> None:
    target = GPUTarget("cuda", capability, 32)
    options = [Scoring(0.1, 1024, 30.0), Scoring(0.1, None, None)]
    for scoring in options if full else options[:1]:
        for name in NAMES:
            function = getattr(kernels, f"prefix_attention_{name}_kernel")
            with mock.patch.object(host, "capability", lambda device: capability):
                launches = compile_launches(
                    lambda scoring=scoring: launch([1024, 512], sizes, scoring), function, target
                )
            for one in launches:
                code = read_machine_code(one.compiled)
                shared = one.compiled.metadata.shared
                row = {"kernel": name, "scoring": scoring, "shared": shared}
                print(json.dumps(row | code._asdict()))


if __name__ == "__main__":
    if sys.argv[1] == "specialisations":
        specialisations()
    else:
        capability, head_size, value_size = map(int, sys.argv[2:5])
        compile_variants(capability, (head_size, value_size), "full" in sys.argv)
