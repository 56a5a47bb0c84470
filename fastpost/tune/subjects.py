"""What is measured: each choice of the kernels, at shapes of models in use.

A subject runs a public op exactly as training does; the option under test reaches it through
`fastpost_kernels._choices`. Its truth is the same op in float32 on the plain torch backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastpost_kernels import (
    Nf4Weight,
    linear_logprob,
    lora_linear,
    nf4_linear,
    nf4_quantize,
    prefix_attention,
)
from fastpost_kernels._choices import (
    adapted_shape,
    attention_shape,
    head_shape,
    layer_shape,
    weight_shape,
)

__all__ = ["ON_GPU", "Sizes", "Subject", "subjects"]

FP32 = torch.float32
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes that stand for their shape class, which is the nearest power of two."""

    fold_rows: tuple[int, ...]
    tile_rows: int
    widths: tuple[int, ...]
    vocabs: tuple[int, ...]
    layer_rows: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]  # outputs and inputs of an adapted layer
    ranks: tuple[int, ...]
    few_rows: tuple[int, ...]  # of a 4-bit layer: one between any two limits to choose from
    head_sizes: tuple[int, ...]
    heads: tuple[int, int]  # of queries and of keys
    prompt: int
    answers: int
    answer: int


ON_GPU = Sizes(
    fold_rows=(512, 1024, 2048, 4096),
    tile_rows=8192,
    widths=(2048, 4096, 8192),
    vocabs=(32_000, 128_256),
    layer_rows=(2048, 8192),
    layers=((2048, 2048), (4096, 4096), (14_336, 4096), (4096, 14_336)),
    ranks=(16, 64),
    few_rows=(16, 32, 64, 128, 256),
    head_sizes=(64, 128),
    heads=(32, 8),
    prompt=4096,
    answers=8,
    answer=512,
)


@dataclass(frozen=True)
class Subject:
    """One choice at one shape. `run`, and the plain op in float32 (`truth`) and in `dtype`
    (`baseline`), return results by name, the same names."""

    choice: str
    shape: str  # class under which the option is stored
    title: str
    dtype: torch.dtype
    make: Callable[[torch.device], Tensors]
    run: Callable[[Tensors], Tensors]
    truth: Callable[[Tensors], Tensors]
    baseline: Callable[[Tensors], Tensors]


def subjects(
    sizes: Sizes = ON_GPU, *, dtype: torch.dtype = torch.bfloat16, backend: str = "triton"
) -> Iterator[Subject]:
    """Every subject.

    Args:
        sizes: shapes; the default is for GPUs.
        dtype: of the operands: what models train in.
        backend: as in the kernels; "triton" on "cpu" needs TRITON_INTERPRET=1.
    """
    for vocab in sizes.vocabs:
        for width in sizes.widths:
            for rows in sizes.fold_rows:
                yield _head("head_fold", (rows, width, vocab), dtype, backend)
            yield _head("head_tile", (sizes.tile_rows, width, vocab), dtype, backend)
    for layer in sizes.layers:
        for rank in sizes.ranks:
            for rows in sizes.layer_rows:
                yield _adapted(rows, layer, rank, dtype)
        yield _four_bit(sizes.few_rows, layer, dtype, backend)
    for size in sizes.head_sizes:
        for choice in ("prefix_forward", "prefix_grad_query", "prefix_grad_key"):
            yield _attention(choice, size, sizes, dtype, backend)


def _head(choice: str, size: tuple[int, int, int], dtype: torch.dtype, backend: str) -> Subject:
    rows, width, vocab = size
    is_fold = choice == "head_fold"
    function = _statistics if is_fold else _frozen_head
    return Subject(
        choice,
        head_shape(rows, width, vocab, dtype) if is_fold else weight_shape(width, vocab, dtype),
        f"M {rows}, H {width}, V {vocab}",
        dtype,
        partial(_make_head, size, dtype),
        partial(function, dtype=dtype, backend=backend),
        partial(function, dtype=FP32, backend="torch"),
        partial(function, dtype=dtype, backend="torch"),
    )


def _make_head(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensors:
    rows, width, vocab = size
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "hidden": normal(rows, width).mul_(4 * width**-0.5),  # logits of about 4
        "weight": normal(vocab, width),
        "targets": torch.randint(0, vocab, (rows,), generator=generator, device=device),
    }


def _statistics(given: Tensors, *, dtype: torch.dtype, backend: str) -> Tensors:
    """A pass without gradients: the reference model's, or the forward of a trained head."""
    with torch.no_grad():
        found = linear_logprob(
            given["hidden"],
            given["weight"],
            given["targets"],
            outputs=("entropy",),
            compute_dtype=dtype,
            backend=backend,
        )
    assert found.entropy is not None
    return {"logprob": found.logprob, "entropy": found.entropy}


def _frozen_head(given: Tensors, *, dtype: torch.dtype, backend: str) -> Tensors:
    """Forward and backward below a frozen head, as LoRA has it."""
    hidden = given["hidden"].detach().requires_grad_()
    found = linear_logprob(
        hidden, given["weight"], given["targets"], compute_dtype=dtype, backend=backend
    )
    (d_hidden,) = torch.autograd.grad(found.logprob.sum(), hidden)
    return {"logprob": found.logprob.detach(), "d hidden": d_hidden}


def _adapted(rows: int, layer: tuple[int, int], rank: int, dtype: torch.dtype) -> Subject:
    outputs, inputs = layer
    return Subject(
        "lora_linear",
        adapted_shape(rows, (inputs, outputs), rank, dtype),
        f"M {rows}, {inputs} -> {outputs}, rank {rank}",
        dtype,
        partial(_make_adapted, rows, layer, rank, dtype),
        partial(_adapt, dtype=dtype, backend="auto"),
        partial(_adapt, dtype=FP32, backend="torch"),
        partial(_adapt, dtype=dtype, backend="torch"),
    )


def _make_adapted(
    rows: int, layer: tuple[int, int], rank: int, dtype: torch.dtype, device: torch.device
) -> Tensors:
    outputs, inputs = layer
    shapes = {"x": (rows, inputs), "weight": layer, "a": (rank, inputs), "b": (outputs, rank)}
    generator = torch.Generator(device).manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(
            1.0 if name == "x" else shape[1] ** -0.5
        )
        for name, shape in shapes.items()
    }


def _adapt(given: Tensors, *, dtype: torch.dtype, backend: str) -> Tensors:
    x, weight, a, b = (given[name].to(dtype) for name in ("x", "weight", "a", "b"))
    with torch.no_grad():
        return {"y": lora_linear(x, weight, None, a, b, 2.0, backend=backend)}


def _four_bit(
    few_rows: tuple[int, ...], layer: tuple[int, int], dtype: torch.dtype, backend: str
) -> Subject:
    outputs, inputs = layer
    return Subject(
        "nf4_rows",
        layer_shape(layer, dtype),
        f"M {', '.join(map(str, few_rows))}, {inputs} -> {outputs}, 4 bits",
        dtype,
        partial(_make_four_bit, max(few_rows), layer, dtype),
        partial(_multiply_rows, few_rows=few_rows, layer=layer, dtype=dtype, backend=backend),
        partial(_multiply_rows, few_rows=few_rows, layer=layer, dtype=FP32, backend="torch"),
        partial(_multiply_rows, few_rows=few_rows, layer=layer, dtype=dtype, backend="torch"),
    )


def _make_four_bit(
    rows: int, layer: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensors:
    generator = torch.Generator(device).manual_seed(1)
    shapes = {"x": (rows, layer[1]), "weight": layer}
    made = {
        name: torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for name, shape in shapes.items()
    }
    weight = nf4_quantize(made["weight"] * layer[1] ** -0.5, double_quant=False)
    return {"x": made["x"], "packed": weight.packed, "absmax": weight.absmax}


def _multiply_rows(
    given: Tensors,
    *,
    few_rows: tuple[int, ...],
    layer: tuple[int, int],
    dtype: torch.dtype,
    backend: str,
) -> Tensors:
    """One product for each number of rows: the best limit has the smallest sum of their times."""
    weight = Nf4Weight(given["packed"], given["absmax"], layer)
    x = given["x"].to(dtype)
    with torch.no_grad():
        return {f"y of {n}": nf4_linear(x[:n], weight, backend=backend) for n in few_rows}


def _attention(choice: str, size: int, sizes: Sizes, dtype: torch.dtype, backend: str) -> Subject:
    end = sizes.prompt + sizes.answers * sizes.answer
    starts = range(sizes.prompt, end, sizes.answer)
    answers = [(first, first + sizes.answer, first + sizes.answer) for first in starts]
    segments = torch.tensor([(0, sizes.prompt, end), *answers])
    backward = choice != "prefix_forward"
    run = partial(_attend, segments=segments, backward=backward)
    return Subject(
        choice,
        attention_shape(size, dtype),
        f"D {size}, {sizes.prompt} + {sizes.answers} x {sizes.answer} tokens",
        dtype,
        partial(_make_attention, size, sizes.heads, end, dtype),
        partial(run, dtype=dtype, backend=backend),
        partial(run, dtype=FP32, backend="torch"),
        partial(run, dtype=dtype, backend="torch"),
    )


def _make_attention(
    size: int, heads: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensors:
    generator = torch.Generator(device).manual_seed(1)
    counts = {"query": heads[0], "key": heads[1], "value": heads[1], "grad": heads[0]}
    return {
        name: torch.randn(
            tokens, count, size, generator=generator, device=device, dtype=dtype
        ).transpose(0, 1)
        for name, count in counts.items()
    }


def _attend(
    given: Tensors, *, segments: Tensor, backward: bool, dtype: torch.dtype, backend: str
) -> Tensors:
    leaves = [given[name].detach().to(dtype) for name in ("query", "key", "value")]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    query, key, value = leaves
    out = prefix_attention(query, key, value, segments, backend=backend)
    if not backward:
        return {"out": out}
    grads = torch.autograd.grad(out, leaves, given["grad"].to(dtype))
    names = ("d query", "d key", "d value")
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}
