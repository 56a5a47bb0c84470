"""prefix_attention as a PyTorch op: registration, gradients on request, layouts, cost, refusals."""

from __future__ import annotations

import importlib
import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastpost_kernels import prefix_attention, workspace_bytes

# The function hides the module of the same name in its package.
module = importlib.import_module("fastpost_kernels.prefix_attention")
passes = importlib.import_module("fastpost_kernels._prefix_passes")
regions = importlib.import_module("fastpost_kernels._prefix_regions")
schedule_of = importlib.import_module("fastpost_kernels._prefix_segments").schedule_of

# Depth 3, two children, a lone row; 30 tokens.
SEGMENTS = torch.tensor(
    [[0, 6, 20], [6, 11, 11], [11, 14, 20], [14, 17, 17], [17, 20, 20], [20, 30, 30]]
)
NUM_TOKENS = 30
DIFFERENTIABLE = ("query", "key", "value", "sinks")


def make_inputs(dtype: torch.dtype = torch.float32, value_size: int = 16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(4, NUM_TOKENS, 16), (2, NUM_TOKENS, 16), (2, NUM_TOKENS, value_size), (4,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def call(inputs: list[Tensor], **options) -> Tensor:
    return prefix_attention(*inputs[:3], SEGMENTS, sinks=inputs[3], **options)


def visible_pairs(window: int | None = None) -> int:
    """Entries of the dense mask, counted from each token's chain of ancestors."""
    count = 0
    for start, end, _ in SEGMENTS.tolist():
        above = sum(e - s for s, e, t in SEGMENTS.tolist() if e <= start < t)
        for path_length in range(above + 1, above + 1 + end - start):
            count += path_length if window is None else min(window, path_length)
    return count


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("window", [None, 5])
def test_opcheck(dtype, backend, window):
    *tensors, sinks = make_inputs(dtype, value_size=8)
    arguments = (*tensors, SEGMENTS, sinks, 0.25, window, None, backend)
    torch.library.opcheck(module._prefix_attention_fwd, arguments)


def test_gradient_of_the_op_in_float64():
    segments = torch.tensor([[0, 2, 5], [2, 3, 3], [3, 5, 5]])
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    inputs.append(torch.randn(2, dtype=torch.float64, requires_grad=True))

    def function(query, key, value, sinks):
        return prefix_attention(query, key, value, segments, sinks=sinks, window=3, softcap=2.0)

    torch.autograd.gradcheck(function, inputs)


def test_compiles_without_graph_breaks():
    inputs = make_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out = compiled(inputs)
    assert torch.equal(out, call(inputs))
    grads = torch.autograd.grad(out.sum(), inputs)
    expected = torch.autograd.grad(call(inputs).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_fake_tensors_have_the_real_layout():
    real = call(make_inputs(value_size=8))
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x.detach()) for x in make_inputs(value_size=8)]
        fake = prefix_attention(*inputs[:3], mode.from_tensor(SEGMENTS), sinks=inputs[3])
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert real.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("window", [None, 5])
def test_flops_count_the_visible_pairs(window):
    """Two products per pair forward, five backward, each 2·Hq·(head size) FLOPs."""
    inputs = make_inputs(value_size=8)
    forward = 2 * 4 * visible_pairs(window) * (16 + 8)
    backward = 2 * 4 * visible_pairs(window) * (3 * 16 + 2 * 8)
    with FlopCounterMode(display=False) as counter:
        out = call(inputs, window=window)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == backward


def test_flops_of_a_fully_visible_pair_are_those_of_the_products():
    """One token sees itself alone: PyTorch's count of the two products needs no halving."""
    query, key, value = (torch.randn(3, 1, 16) for _ in range(3))
    with FlopCounterMode(display=False) as ours:
        prefix_attention(query, key, value, torch.tensor([[0, 1, 1]]))
    with FlopCounterMode(display=False) as pytorchs:
        torch.softmax(query @ key.mT, -1) @ value
    assert ours.get_total_flops() == pytorchs.get_total_flops() > 0


def test_fake_segments_count_as_one_row():
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        x = torch.randn(1, 10, 4)
        prefix_attention(x, x, x, mode.from_tensor(torch.tensor([[0, 5, 5], [5, 10, 10]])))
    assert counter.get_total_flops() == 2 * 55 * 8


class LiveMemory(TorchDispatchMode):
    """Follows the bytes of all tensors made under it: the most alive at once, and the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.live and key not in given:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        self.largest = max(self.largest, *self.live.values(), 0)
        return result


def test_explicit_scores_stay_within_the_memory_bound(monkeypatch):
    bound = 1 << 14
    monkeypatch.setattr(regions, "MAX_SCORES", bound)
    query, key, value = (torch.randn(1, 2, 512, 4) for _ in range(3))
    positions = torch.arange(512)
    scoring = regions.Scoring(0.5, None, 3.0)
    with LiveMemory() as memory:
        out, lse = regions.explicit_forward(query, key, value, positions, positions, scoring)
        regions.explicit_backward(out, query, key, value, out, lse, positions, positions, scoring)
    assert 4 * 512 * 2 * 4 <= memory.largest <= 4 * bound < 4 * 2 * 512 * 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("softcap", "value_size"),
    [(None, 64), (None, 32), (3.0, 64)],
    ids=["flash", "padded", "explicit"],
)
def test_workspace_bounds_the_live_memory(softcap, value_size, dtype, monkeypatch):
    """An upper bound of what a run holds, and no more than six times that."""
    monkeypatch.setattr(regions, "MAX_SCORES", 1 << 12)
    # One call of C++ holds nothing that PyTorch sees.
    monkeypatch.setattr("fastpost_kernels._prefix_native._MAX_PATH_ON_TILES", 0)
    torch.manual_seed(0)
    num_tokens = 800
    segments = torch.tensor([[0, 400, 800], [400, 600, 600], [600, 800, 800]])
    query, key, value = (
        torch.randn(num_tokens, heads, size).to(dtype).transpose(0, 1)
        for heads, size in ((4, 64), (2, 64), (2, value_size))
    )
    schedule = importlib.import_module("fastpost_kernels._prefix_segments").schedule_of(
        segments, num_tokens
    )
    scoring = regions.Scoring(0.1, None, softcap)
    with LiveMemory() as memory:
        out, lse = passes.forward(query, key, value, None, schedule, scoring, "cpu")
    results = out.nbytes + lse.nbytes
    bound = workspace_bytes(
        module._prefix_attention_fwd._opoverload,
        *(query, key, value, segments, None, 0.1, None, softcap, "cpu"),
    )
    assert memory.peak - results <= bound <= 6 * (memory.peak - results)

    with LiveMemory() as memory:
        grads = passes.backward(out, query, key, value, out, lse, schedule, scoring, "cpu")
    results = sum(x.nbytes for x in grads)
    bound = workspace_bytes(
        module._prefix_attention_bwd._opoverload,
        *(out, query, key, value, out, lse, segments, 0.1, None, softcap, "cpu"),
    )
    assert memory.peak - results <= bound <= 6 * (memory.peak - results)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_every_result_is_written(backend):
    """With fresh memory filled with NaN, none may come through."""
    inputs = make_inputs(value_size=8)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1000).isnan().all()
        out = call(inputs, window=3, backend=backend)
        grads = torch.autograd.grad(out.sum(), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("needed", DIFFERENTIABLE)
def test_only_the_needed_gradients_are_returned(needed):
    inputs = make_inputs()
    expected = dict(
        zip(DIFFERENTIABLE, torch.autograd.grad(call(inputs).sum(), inputs), strict=True)
    )
    for name, x in zip(DIFFERENTIABLE, inputs, strict=True):
        x.requires_grad_(name == needed)
    call(inputs).sum().backward()
    for name, x in zip(DIFFERENTIABLE, inputs, strict=True):
        if name == needed:
            assert torch.equal(x.grad, expected[name])
        else:
            assert x.grad is None


def test_a_second_backward_gives_the_same_gradients():
    inputs = make_inputs()
    out = call(inputs)
    first = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_changing_the_output_before_the_backward_is_noticed():
    out = call(make_inputs())
    doubled = out * 2
    with torch.no_grad():
        out.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        doubled.sum().backward()


def test_inputs_are_left_as_they_were():
    inputs = make_inputs()
    before = [x.detach().clone() for x in inputs]
    segments = SEGMENTS.clone()
    call(inputs).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    assert torch.equal(segments, SEGMENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype):
    """Views into one fused qkv buffer, a transposed last dimension, an expanded gradient."""
    torch.manual_seed(0)
    fused = torch.randn(NUM_TOKENS, 8, 16, dtype=dtype).transpose(0, 1)
    views = [fused[:4], fused[4:6], fused[6:].mT.contiguous().mT]
    views = [x.requires_grad_() for x in (v.detach() for v in views)]
    assert views[2].stride(-1) != 1
    copies = [x.detach().clone(memory_format=torch.contiguous_format) for x in views]
    copies = [x.requires_grad_() for x in copies]
    out, expected = (prefix_attention(*x, SEGMENTS) for x in (views, copies))
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.sum(), views)  # grad_out has stride 0
    grad_out = torch.ones(expected.shape, dtype=dtype)
    expected_grads = torch.autograd.grad(expected, copies, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_no_tokens():
    inputs = [torch.randn(2, 0, 8, requires_grad=True) for _ in range(3)]
    out = prefix_attention(*inputs, torch.empty(0, 3, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (2, 0, 8)
    assert all(x.grad.shape == (2, 0, 8) for x in inputs)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 30, 30]], "must start at 0"),
        ([[0, 5, 5], [6, 30, 30]], "must start at 5"),
        ([[0, 5, 5], [5, 5, 5], [5, 30, 30]], "is empty"),
        ([[0, 5, 4], [5, 30, 30]], "does not nest"),
        ([[0, 5, 12], [5, 8, 14], [8, 30, 30]], "does not nest"),
        ([[0, 5, 12], [5, 20, 20], [20, 30, 30]], "does not nest"),
        ([[0, 5, 31], [5, 31, 31]], "does not nest"),
        ([[0, 5, 5], [5, 20, 20]], "cover 20 tokens, but there are 30"),
    ],
)
def test_wrong_segments_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        prefix_attention(*make_inputs()[:3], torch.tensor(rows))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(1, 4, 30, 16)}, ValueError, "drop the batch dimension"),
        ({"key": torch.randn(2, 29, 16)}, ValueError, "disagree in tokens"),
        ({"value": torch.randn(1, 30, 16)}, ValueError, "disagree in tokens, heads"),
        ({"key": torch.randn(2, 30, 8)}, ValueError, "head size"),
        ({"query": torch.randn(5, 30, 16)}, ValueError, "multiple of key heads"),
        ({"value": torch.randn(2, 30, 16).double()}, TypeError, "share one floating dtype"),
        ({"segments": SEGMENTS[:, :2]}, ValueError, r"must be \[S, 3\]"),
        ({"segments": SEGMENTS.int()}, TypeError, "int64 on the CPU"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must be \[Hq\] = \[4\]"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_wrong_arguments_are_refused(change, error, message):
    query, key, value, _ = make_inputs()
    arguments = {"query": query, "key": key, "value": value, "segments": SEGMENTS} | change
    with pytest.raises(error, match=message):
        prefix_attention(**arguments)
