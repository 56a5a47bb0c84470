"""`adamw_8bit_` against AdamW in float64 and against bitsandbytes, on every backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ops.measuring import peak_bytes
from fastpost_kernels import AdamWState, adamw_8bit_, adamw_state, reference, workspace_bytes
from fastpost_kernels import _adamw_8bit_passes as passes
from fastpost_kernels._adamw_8bit_tables import Lists, Rule
from fastpost_kernels._csrc import library
from fastpost_kernels._dynamic_map import dequantize, levels, quantize
from fastpost_kernels.adamw_8bit import adamw_8bit_op
from fastpost_kernels.testing import EPSILON, Canary, relative_errors

FP32, BF16 = torch.float32, torch.bfloat16
BACKENDS = ["torch", "triton"] + (["cpp"] if library() is not None else [])
# below one block, one, one over, empty, several pieces and a partial one, 16 divides it or not
SHAPES = [(1,), (255,), (16, 16), (257,), (0, 3), (3, 1707), (4096,), (9001,)]
RULE: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}

Tensors = list[Tensor]


def randoms(seed: int, dtype: torch.dtype = FP32) -> Tensors:
    """Magnitudes over four decades within each block."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in SHAPES:
        exponent = -4 * torch.rand(shape, generator=generator)
        found.append((torch.randn(shape, generator=generator) * 10**exponent).to(dtype))
    return found


def fresh_states(params: Tensors, is_8bit: bool = True) -> list[AdamWState]:
    """Of a run that has begun."""
    states = []
    for param, m, v in zip(params, randoms(11), randoms(12), strict=True):
        state = adamw_state(param, is_8bit=is_8bit)
        for values, codes, absmax, signed in (
            (m, state.exp_avg, state.absmax, True),
            (v.square(), state.exp_avg_sq, state.absmax_sq, False),
        ):
            if is_8bit:
                found, largest = quantize(values.flatten(), signed)
                codes.copy_(found.view(values.shape))
                absmax.copy_(largest)
            else:
                codes.copy_(values)
        states.append(state)
    return states


def moments(state: AdamWState, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    if state.exp_avg.dtype == FP32:
        return state.exp_avg.to(dtype), state.exp_avg_sq.to(dtype)
    shape = state.exp_avg.shape
    return (
        dequantize(state.exp_avg.flatten(), state.absmax, True).to(dtype).view(shape),
        dequantize(state.exp_avg_sq.flatten(), state.absmax_sq, False).to(dtype).view(shape),
    )


def joined(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


@pytest.mark.parametrize("is_8bit", [True, False], ids=["8bit", "fp32 states"])
@pytest.mark.parametrize("grad_dtype", [FP32, BF16], ids=["fp32 grad", "bf16 grad"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_step_is_that_of_float64(
    backend: str, dtype: torch.dtype, grad_dtype: torch.dtype, is_8bit: bool
) -> None:
    params, grads = randoms(1, dtype), randoms(2, grad_dtype)
    states = fresh_states(params, is_8bit)
    expected = [
        reference.adamw(
            p.double(), 0.7 * g.double(), *moments(s), step=5, lr=1e-2, betas=(0.8, 0.95),
            eps=1e-8, weight_decay=0.1,
        )
        for p, g, s in zip(params, grads, states, strict=True)
    ]  # fmt: skip
    adamw_8bit_(
        params, grads, states, steps=[5] * len(params), grad_scale=0.7, backend=backend, **RULE
    )
    weights, ms, vs = (joined(x) for x in zip(*expected, strict=True))
    found = [moments(state) for state in states]
    largest, _ = relative_errors(joined(params), weights)
    # the interpreter cuts bf16 off where GPUs round: a whole unit of error instead of half
    is_cut_off = backend == "triton" and dtype == BF16
    assert largest <= EPSILON[dtype] * (2 if is_cut_off else 1)
    if not is_8bit:
        assert relative_errors(joined(m for m, _ in found), ms)[0] <= EPSILON[FP32]
        assert relative_errors(joined(v for _, v in found), vs)[0] <= EPSILON[FP32]
        return
    for index, values in ((0, [x[1] for x in expected]), (1, [x[2] for x in expected])):
        for state, kept, exact in zip(states, found, values, strict=True):
            codes = (state.exp_avg, state.exp_avg_sq)[index].flatten()
            assert_nearest(codes, kept[index].flatten(), exact.flatten(), signed=index == 0)


def assert_nearest(codes: Tensor, kept: Tensor, exact: Tensor, signed: bool) -> None:
    """No level lies nearer than the one taken; but a positive second moment never becomes 0."""
    table = levels(signed).double()
    for begin in range(0, exact.numel(), 256):
        part, block = kept[begin : begin + 256], exact[begin : begin + 256]
        absmax = block.abs().max()
        distance = (block[:, None] / absmax - table).abs().min(1).values * absmax
        error = (part - block).abs()
        is_raised = ((codes[begin : begin + 256] == 1) & (block > 0)) & (not signed)
        limit = distance + 1e-5 * distance + 1e-6 * absmax * (1e-3 + block.abs() / absmax)
        assert (error <= torch.where(is_raised, levels(False)[1].double() * absmax, limit)).all()


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(levels(signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_level_is_kept(backend: str) -> None:
    """A step that changes no moment finds every code of both maps again."""
    param = torch.zeros(512)
    for codes in (torch.arange(256), torch.arange(255, -1, -1)):
        state = adamw_state(param)
        state.exp_avg.copy_(codes.repeat(2))
        state.exp_avg_sq.copy_(codes.repeat(2))
        state.absmax.copy_(torch.tensor([3.0, 1e-30]))
        state.absmax_sq.copy_(torch.tensor([0.1, 1e20]))
        before = AdamWState(*(x.clone() for x in state))
        adamw_8bit_(
            [param], [torch.zeros(512)], [state], lr=0.0, betas=(1 - 1e-12, 1 - 1e-12),
            steps=[1], backend=backend,
        )  # fmt: skip
        for got, expected in zip(state, before, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("signed", [True, False])
def test_no_byte_of_bitsandbytes_is_nearer(signed: bool) -> None:
    """Its search on CPUs misses the nearest level of some elements; ours does not."""
    functional = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(1 << 14)
    values = values if signed else values.square()
    codes, absmax = quantize(values, signed)
    theirs, state = functional.quantize_blockwise(values, code=levels(signed), blocksize=256)
    assert torch.equal(absmax, state.absmax)
    assert (codes != theirs).float().mean() < 0.05
    ours_off, theirs_off = ((dequantize(x, absmax, signed) - values).abs() for x in (codes, theirs))
    is_raised = (codes == 1) & (values > 0) & (not signed)
    assert ((ours_off <= theirs_off + 1e-6 * theirs_off + 1e-9) | is_raised).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_stay_beside_bitsandbytes(backend: str) -> None:
    """The same weights within what its own quantisation costs it against fp32 states."""
    optim = pytest.importorskip("bitsandbytes.optim")
    generator = torch.Generator().manual_seed(4)
    first = torch.randn(64, 64, generator=generator)
    ours, theirs, exact = (first.clone().requires_grad_() for _ in range(3))
    state = adamw_state(ours)
    peer = optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.1)
    stock = torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1)
    for step in range(1, 21):
        grad = torch.randn(64, 64, generator=generator)
        theirs.grad, exact.grad = grad, grad
        peer.step()
        stock.step()
        adamw_8bit_(
            [ours], [grad], [state], lr=1e-2, weight_decay=0.1, steps=[step], backend=backend
        )
    cost = (theirs - exact).square().mean().sqrt()
    assert (ours - theirs).square().mean().sqrt() <= 0.3 * cost
    assert (ours - exact).square().mean().sqrt() <= 1.05 * cost


def test_backends_agree() -> None:
    """To the last bit of bf16 weights but for ties, with the random words of all steps."""
    results = {}
    for backend in BACKENDS:
        params, states = randoms(1, BF16), fresh_states(randoms(1))
        for step in range(1, 4):
            adamw_8bit_(
                params, randoms(step), states, steps=[step] * len(params), seed=2**32 - 1,
                streams=[i | 5 << 32 for i in range(len(params))], backend=backend, **RULE,
            )  # fmt: skip
        results[backend] = joined(params), joined(s.exp_avg for s in states)
    for weights, codes in results.values():
        assert (weights != results["torch"][0]).double().mean() < 2e-3
        assert (codes != results["torch"][1]).double().mean() < 2e-3


@pytest.mark.skipif(library() is None, reason="the compiled passes are not built")
@pytest.mark.parametrize("simd", [0, 1, 2])
def test_every_instruction_set_and_thread_count(simd: int) -> None:
    found = []
    for threads in (1, 2):
        params, states = randoms(1, BF16), fresh_states(randoms(1))
        lists = Lists(params, randoms(2), *map(list, zip(*states, strict=True)))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        passes.update_cpp(lists, Rule(3, 1e-2, 0.9, 0.99, 1e-8, 0.1, None, 8), range(8), simd)
        torch.set_num_threads(before)
        found.append(joined([*params, *(x for state in states for x in state)]))
    assert torch.equal(*found)
    best_params, best_states = randoms(1, BF16), fresh_states(randoms(1))
    lists = Lists(best_params, randoms(2), *map(list, zip(*best_states, strict=True)))
    passes.update_torch(lists, Rule(3, 1e-2, 0.9, 0.99, 1e-8, 0.1, None, 8), range(8))
    best = joined([*best_params, *(x for state in best_states for x in state)])
    assert (found[0] - best).ne(0).double().mean() < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_rounding_is_unbiased(backend: str) -> None:
    """The mean over many elements is the fp32 weight; to nearest the step is lost altogether."""
    size, change = 1 << 14, 2.0**-11  # an eighth of a unit of bf16 at 1
    for seed, mean in ((5, 1 - change), (None, 1.0)):
        param = torch.ones(size, dtype=BF16)
        state = adamw_state(param)
        adamw_8bit_(
            [param], [torch.ones(size)], [state], lr=change, steps=[1], seed=seed, backend=backend
        )
        values = set(param.tolist())
        if seed is None and backend == "triton":
            continue  # the interpreter cuts bf16 off
        # a unit below 1 is 2^-8; the standard deviation of the mean is that over sqrt(4 size)
        assert abs(float(param.double().mean()) - mean) <= 4 * 2**-8 / (4 * size) ** 0.5 * (
            seed is not None
        )
        assert values == ({1.0, 1 - 2**-8} if seed is not None else {1.0})


def test_random_words_depend_on_seed_step_stream_and_element() -> None:
    def weights(seed: int, step: int, stream: int) -> Tensor:
        param = torch.ones(4096, dtype=BF16)
        grads = [torch.ones(4096)]
        state = adamw_state(param, is_8bit=False)
        adamw_8bit_(
            [param], grads, [state], lr=2.0**-9, steps=[step], seed=seed, streams=[stream],
            betas=(0.0, 0.0),
        )  # fmt: skip
        return param

    first = weights(1, 1, 0)
    assert torch.equal(first, weights(1, 1, 0))
    assert (first[:2048] == first[2048:]).float().mean() < 0.6
    for other in (weights(2, 1, 0), weights(1, 2, 0), weights(1, 1, 1), weights(1, 1, 1 << 32)):
        assert 0.4 < (first == other).float().mean() < 0.6


@pytest.mark.parametrize("is_8bit", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_beyond_the_tensors_is_touched(backend: str, is_8bit: bool) -> None:
    params = randoms(1, BF16)
    plain = [p.clone() for p in params], fresh_states(params, is_8bit)
    # margins of 16 elements keep some addresses aligned, of 5 none
    for margin in (16, 5):

        def guard(tensor: Tensor, margin: int = margin) -> Canary:
            return Canary(tensor.flatten(), margin)

        guarded = [guard(p) for p in params]
        states = [[guard(x) for x in s] for s in fresh_states(params, is_8bit)]
        grads = [guard(g) for g in randoms(2)]
        inner = [AdamWState(*(x.inner for x in s)) for s in states]
        adamw_8bit_(
            [p.inner for p in guarded], [g.inner for g in grads], inner,
            steps=[2] * len(params), seed=3, backend=backend, **RULE,
        )  # fmt: skip
        for canary in (*guarded, *grads, *(x for s in states for x in s)):
            canary.assert_untouched()
        assert torch.equal(joined(g.inner for g in grads), joined(randoms(2)))
        weights, expected = copy.deepcopy(plain)
        adamw_8bit_(
            weights, randoms(2), expected, steps=[2] * len(params), seed=3, backend=backend, **RULE
        )
        assert torch.equal(joined(p.inner for p in guarded), joined(weights))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_shows(backend: str) -> None:
    param, grad = torch.ones(4096, dtype=BF16), torch.ones(4096)
    grad[7], grad[300] = float("nan"), float("inf")
    adamw_8bit_([param], [grad], [adamw_state(param)], lr=1e-3, steps=[1], seed=1, backend=backend)
    assert param[7].isnan() and param[300].isnan() and param[600:].isfinite().all()


def test_a_second_moment_never_becomes_zero() -> None:
    """After a large gradient and none, the first moment must not be divided by eps."""
    for backend in BACKENDS:
        param = torch.zeros(4096)
        state = adamw_state(param)
        grad = torch.ones(4096)
        grad[0] = 1e-4  # its square is 1e-8 of the largest
        for step, factor in ((1, 1.0), (2, 0.0)):
            adamw_8bit_([param], [factor * grad], [state], lr=1e-3, steps=[step], backend=backend)
        assert param[0].abs() <= 2.5e-3, backend


def test_opcheck() -> None:
    params, grads = randoms(1, BF16)[-2:], randoms(2, BF16)[-2:]
    states = [adamw_state(p) for p in params]
    lists = [list(x) for x in zip(*states, strict=True)]
    scale = torch.tensor(0.5)
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.0, 3, "torch")
    torch.library.opcheck(adamw_8bit_op, (params, grads, *lists, scale, [0, 1], 1, *numbers))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr, eps and weight_decay"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas"),
        ({"seed": 2**32}, ValueError, "seed"),
        ({"steps": [0]}, ValueError, "counted from 1"),
        ({"steps": [1, 2]}, ValueError, "as many"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"grads": [torch.ones(3)]}, ValueError, "gradient"),
        ({"grads": [torch.ones(4, dtype=torch.float64)]}, TypeError, "float32 or bfloat16"),
        ({"grads": [torch.ones(4).to_sparse()]}, TypeError, "dense"),
        ({"params": [torch.ones(8)[::2]]}, ValueError, "contiguous"),
        ({"states": [adamw_state(torch.ones(300))]}, ValueError, "adamw_state"),
        ({"grad_scale": torch.ones(2)}, ValueError, "one number"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = {
        "params": [torch.ones(4)], "grads": [torch.ones(4)],
        "states": [adamw_state(torch.ones(4))], "lr": 1e-3, "steps": [1],
    }  # fmt: skip
    with pytest.raises(error, match=words):
        adamw_8bit_(**{**given, **change})


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_the_workspace_is_within_its_formula(backend: str) -> None:
    params = [torch.randn(n).to(BF16) for n in (700, 600_000)]
    lists = [list(x) for x in zip(*(adamw_state(p) for p in params), strict=True)]
    arguments = (params, params, *lists, None, [0, 1], 1, 1e-3, 0.9, 0.99, 1e-8, 0.1, 3, backend)
    used = peak_bytes(lambda: adamw_8bit_op(*arguments))
    allowed = workspace_bytes(torch.ops.fastpost_kernels.adamw_8bit_.default, *arguments)
    assert used <= allowed <= max(3 * used, 1 << 17)
