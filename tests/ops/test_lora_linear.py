"""lora_linear and lora_linears against the float64 reference; dropout; their ops."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastpost_kernels import LoraWeights, lora_linear, lora_linears, reference
from fastpost_kernels._adapter_passes import dropout
from fastpost_kernels._philox import random_words, threshold_of
from fastpost_kernels.lora_linear import lora_linear_fwd
from fastpost_kernels.testing import assert_close_to_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BACKENDS = [
    pytest.param("torch", FP64, id="torch-fp64"),
    pytest.param("torch", FP32, id="torch-fp32"),
    pytest.param("cpp", BF16, id="cpp-bf16"),
    pytest.param("triton", FP32, id="triton-fp32"),
    pytest.param("triton", BF16, id="triton-bf16"),
]
NAMES = ("x", "weight", "bias", "a", "b")


def problem(
    rows: int, inputs: int, outputs: int, rank: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """x, weight, bias, a, b and the gradient of y."""
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rank, inputs), (outputs, rank))
    tensors = [torch.randn(*shape).to(dtype) for shape in shapes]
    return tensors, torch.randn(rows, outputs).to(dtype)


def results(f: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, **options: Any):
    """y and the gradient of every tensor."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = f(*leaves, 0.75, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_matches(got: list[Tensor], tensors, grad, dtype, kept: Tensor | None = None) -> None:
    truth, rough = (
        results(
            reference.lora_linear,
            [t.to(kind) for t in tensors],
            grad.to(kind),
            kept=None if kept is None else kept.to(kind),
        )
        for kind in (FP64, dtype)
    )
    for name, *values in zip(("y", *NAMES), got, truth, rough, strict=True):
        assert_close_to_reference(*values, dtype, name)


@pytest.mark.parametrize("shape", [(5, 24, 40, 4), (33, 70, 19, 1)])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_matches_reference(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors, grad = problem(*shape, dtype)
    got = results(lora_linear, tensors, grad, backend=backend)
    assert all(t.dtype == dtype for t in got)
    assert_matches(got, tensors, grad, dtype)


@given(
    rows=st.sampled_from([0, 1, 3, 17]),
    inputs=st.sampled_from([1, 7, 64, 131]),
    outputs=st.sampled_from([1, 5, 64, 130]),
    rank=st.sampled_from([1, 3, 16]),
    backend=st.sampled_from(["cpp", "triton"]),
)
def test_ragged_shapes(rows: int, inputs: int, outputs: int, rank: int, backend: str) -> None:
    tensors, grad = problem(rows, inputs, outputs, rank, FP32)
    assert_matches(results(lora_linear, tensors, grad, backend=backend), tensors, grad, FP32)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_dropout_is_drawn_again_in_the_backward(backend: str, dtype: torch.dtype) -> None:
    tensors, grad = problem(21, 75, 30, 4, dtype)
    p, seed = 0.35, 2**61 + 12345
    kept = (random_words(seed, 21, 75) >= threshold_of(p)).to(FP64) / (1 - p)
    got = results(lora_linear, tensors, grad, dropout_p=p, seed=seed, backend=backend)
    assert_matches(got, tensors, grad, dtype, kept)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_masks_are_equal_on_every_backend(backend: str) -> None:
    x = torch.randn(7, 1031)
    for seed in (0, 1, 2**62 + 3, -1):
        assert torch.equal(dropout(x, 0.2, seed, backend), dropout(x, 0.2, seed, "torch"))


@pytest.mark.parametrize("level", [0, 1, 2], ids=["portable", "avx2", "avx512"])
def test_masks_are_equal_on_every_instruction_set(level: int) -> None:
    x = torch.randn(5, 300).to(BF16)
    assert torch.equal(dropout(x, 0.5, 9, "cpp", level), dropout(x, 0.5, 9, "cpp"))


def test_masks_look_random() -> None:
    """Their mean, their seeds, rows and columns; the first words stay what they are."""
    words = random_words(7, 400, 1000)
    assert words[0, :3].tolist() == [1429110215, 1656105903, 94125003]
    bits = (words >= threshold_of(0.1)).double()
    deviation = (0.1 * 0.9 / bits.numel()) ** 0.5
    assert abs(bits.mean() - 0.9) < 4 * deviation
    for other in (random_words(8, 400, 1000), words.roll(1, 0), words.roll(1, 1)):
        both = (bits * (other >= threshold_of(0.1))).mean()
        assert abs(both - 0.81) < 5 * (0.81 * 0.19 / bits.numel()) ** 0.5
    assert words.unique().numel() > 0.999 * words.numel()


def test_a_group_equals_its_layers() -> None:
    """One pass over x; layers of different widths, ranks, scales and biases."""
    x = torch.randn(2, 9, 32, dtype=FP64, requires_grad=True)
    layers = []
    for outputs, rank, scale, has_bias in ((20, 4, 0.5, True), (12, 2, 2.0, False)):
        shapes = ((outputs, 32), (outputs,), (rank, 32), (outputs, rank))
        weight, bias, a, b = (torch.randn(*s, dtype=FP64, requires_grad=True) for s in shapes)
        layers.append(LoraWeights(weight, bias if has_bias else None, a, b, scale))
    leaves = [x, *(t for layer in layers for t in layer[:4] if t is not None)]
    options = {"dropout_p": 0.25, "seed": 3}
    together = lora_linears(x, layers, **options)
    apart = [lora_linear(x, *layer, **options) for layer in layers]
    weights = [torch.randn_like(y) for y in together]
    for got, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(got, expected)
    grads = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, weights, strict=True)), leaves)
        for ys in (together, apart)
    ]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_one_unused_output_of_a_group() -> None:
    x, w, a, b = (torch.randn(*s, requires_grad=True) for s in ((4, 8), (6, 8), (2, 8), (6, 2)))
    first, _ = lora_linears(x, [LoraWeights(w, None, a, b, 1.0)] * 2)
    got = torch.autograd.grad(first.sum(), (x, w, a, b))
    expected = torch.autograd.grad(lora_linear(x, w, None, a, b, 1.0).sum(), (x, w, a, b))
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_plain_calls_equal_those_of_the_op() -> None:
    """Who counts FLOPs is given the op, others one node of autograd: bits and refusals agree."""
    (x, weight, bias, a, b), grad = problem(6, 10, 8, 2, FP32)
    x, weight, a = (t.requires_grad_() for t in (x, weight, a))
    layers = [LoraWeights(weight, bias, a, b, 0.5), LoraWeights(weight, None, a, b, 2.0)]

    def run() -> tuple[str, list[Tensor]]:
        unused, y = lora_linears(x, layers, dropout_p=0.2, seed=5)
        found = torch.autograd.grad(y, (x, weight, a), grad, retain_graph=True)
        with pytest.raises(RuntimeError):
            again = torch.autograd.grad(y, x, grad, create_graph=True)[0]
            again.sum().backward()
        return unused.grad_fn.name(), [unused.detach(), y.detach(), *found]

    plain_node, plain = run()
    with FlopCounterMode(display=False):
        op_node, watched = run()
    assert plain_node != op_node
    for got, expected in zip(plain, watched, strict=True):
        assert torch.equal(got, expected)


def test_a_dropped_graph_is_freed_at_once() -> None:
    (x, weight, bias, a, b), _ = problem(6, 10, 8, 2, FP32)
    held = x.requires_grad_() * 1  # its only other owner is the graph
    alive = weakref.ref(held)
    y = lora_linear(held, weight, bias, a.requires_grad_(), b, 1.0)
    del held
    assert alive() is not None
    gc.disable()
    try:
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_frozen_parts_cost_nothing() -> None:
    """FLOPs follow what needs a gradient, as the formulas of the op say, and as those that ran."""
    rows, inputs, outputs, rank = 16, 24, 40, 4
    (x, weight, bias, a, b), grad = problem(rows, inputs, outputs, rank, FP32)
    x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    base, adapter = 2 * rows * inputs * outputs, 2 * rows * rank * (inputs + outputs)
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(x, weight, bias, a, b, 1.0)
    assert counter.get_total_flops() == base + adapter
    with FlopCounterMode(display=False) as counter:
        y.backward(grad)
    assert counter.get_total_flops() == base + 2 * adapter
    with FlopCounterMode(display=False) as counter:
        plain = torch.nn.functional.linear(x, weight, bias) + (x @ a.T) @ b.T
        plain.backward(grad)
    assert counter.get_total_flops() == 2 * base + 3 * adapter


def test_keeps_only_x_and_u() -> None:
    (x, weight, bias, a, b), _ = problem(64, 48, 80, 4, FP32)
    x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, a, b, 1.0, dropout_p=0.1, seed=1)
    activations = {t.data_ptr(): t.numel() for t in kept if t.shape[:1] == (64,)}
    assert sorted(activations.values()) == [64 * 4, 64 * 48]


@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_adapters_of_a_bf16_layer(autocast: bool) -> None:
    """As PEFT keeps them: results in bf16, gradients in the adapter's own dtype."""
    tensors, grad = problem(12, 32, 20, 4, FP32)
    leaves = [t.requires_grad_() for t in tensors]
    x, weight, bias, a, b = leaves
    with torch.autocast("cpu", BF16, enabled=autocast):
        args = (x, weight, bias) if autocast else (x.to(BF16), weight.to(BF16), bias.to(BF16))
        y = lora_linear(*args, a, b, 0.75)
    assert y.dtype == BF16
    got = [y.detach(), *torch.autograd.grad(y, leaves, grad.to(BF16))]
    assert all(g.dtype == FP32 for g in got[1:])
    truth = results(reference.lora_linear, [t.to(FP64) for t in tensors], grad.to(FP64))
    for name, found, right in zip(("y", *NAMES), got, truth, strict=True):
        torch.testing.assert_close(
            found.double(), right, rtol=0.03, atol=0.03 * float(right.abs().max()), msg=name
        )


def test_opcheck() -> None:
    x, weight, bias, a, b = (t.requires_grad_() for t in problem(6, 10, 8, 2, FP32)[0])
    absent = torch.empty(0)
    args = (x, [weight, weight], [bias, absent], torch.cat([a, a]), [b, b], [0.5, 2.0])
    torch.library.opcheck(lora_linear_fwd, (*args, 0.2, 5, "auto"))


def test_compiles_without_a_break() -> None:
    tensors, grad = problem(6, 10, 8, 2, FP32)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        results(compiled, tensors, grad), results(lora_linear, tensors, grad), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 9)}, r"expected x \[\.\.\., 8\], a \[r, 8\]"),
        ({"b": torch.zeros(6, 3)}, r"b \[6, 2\]"),
        ({"bias": torch.zeros(5)}, r"expected bias \[6\]"),
        ({"dropout_p": 1.0}, r"\[0, 1\)"),
        ({"dropout_p": 0.1}, "seed is None"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    tensors = {
        "x": torch.zeros(3, 8),
        "weight": torch.zeros(6, 8),
        "bias": None,
        "a": torch.zeros(2, 8),
        "b": torch.zeros(6, 2),
    }
    with pytest.raises(ValueError, match=message):
        lora_linear(**(tensors | {"scale": 1.0} | change))
    with pytest.raises(TypeError, match="x must be floating"):
        lora_linear(**(tensors | {"scale": 1.0, "x": torch.zeros(3, 8, dtype=torch.int64)}))
    with pytest.raises(ValueError, match="layers is empty"):
        lora_linears(torch.zeros(3, 8), [])
