"""The C++ layer kernel: every instruction set, any number of threads, no foreign memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpost_kernels import _prefix_native as native
from fastpost_kernels import prefix_attention, reference
from fastpost_kernels._prefix_segments import schedule_of

# Blocks are 36 rows by 64 keys, on tiles 32 by 32: segments below, at and above, two levels deep.
SEGMENTS = torch.tensor(
    [
        (0, 70, 347),
        (70, 106, 180),
        (106, 143, 143),
        (143, 180, 180),
        (180, 309, 347),
        (309, 310, 310),
        (310, 347, 347),
        (347, 400, 400),
    ]
)
TOKENS = 400


def chains() -> Tensor:
    """Three trees of segments of 1 to 130 tokens, around every size of block, up to eight deep."""
    lengths = [1, 2, 15, 16, 17, 31, 32, 33] + [47, 48, 49, 63, 64, 65, 95, 96] + [97, 130, 1, 5]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    tops = [ends[7]] * 8 + [ends[15]] + [ends[11]] * 3 + [ends[15]] * 4 + [ends[19]] * 4
    tops[17] = ends[17]
    starts = [0, *ends[:-1]]
    return torch.tensor(list(zip(starts, ends, tops, strict=True)))


def inputs(
    dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int], tokens: int = TOKENS
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, size: int) -> Tensor:
        x = torch.randn(tokens, count, size, generator=generator)
        return x.to(dtype).transpose(0, 1)

    query_heads, key_heads = heads
    return [
        draw(query_heads, sizes[0]),
        draw(key_heads, sizes[0]),
        draw(key_heads, sizes[1]),
        draw(query_heads, sizes[1]),
    ]


def run(function, tensors: list[Tensor], segments: Tensor = SEGMENTS, **options) -> list[Tensor]:
    query, key, value = (x.detach().clone().requires_grad_() for x in tensors[:3])
    out = function(query, key, value, segments, **options)
    return [out, *torch.autograd.grad(out, (query, key, value), tensors[3].to(out.dtype))]


@pytest.mark.parametrize("limit", [0, 1, 2, 3], ids=["portable", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "sizes"), [((6, 2), (64, 64)), ((3, 3), (96, 40)), ((2, 1), (7, 7))], ids=str
)
def test_every_instruction_set(limit, dtype, heads, sizes, monkeypatch) -> None:
    monkeypatch.setattr(native, "_SIMD_LIMIT", limit)
    tensors = inputs(dtype, heads, sizes)
    assert native.can_run_native(tensors[0], schedule_of(SEGMENTS, TOKENS), None, None)
    truth = run(reference.prefix_attention, [x.double() for x in tensors])
    actual = run(prefix_attention, tensors, backend="cpu")
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    for found, expected in zip(actual, truth, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    ("heads", "sizes"), [((9, 3), (64, 64)), ((4, 1), (40, 96)), ((2, 2), (33, 7))], ids=str
)
def test_bf16_of_ragged_and_deep_forests(heads, sizes) -> None:
    """Blocks of the tile kernel are 32 tokens and 32 columns: below, at and above both."""
    segments = chains()
    tensors = inputs(torch.bfloat16, heads, sizes, int(segments[-1, 1]))
    tensors[0] *= 4  # scores of some tens: rows whose weight sits on one key
    schedule = schedule_of(segments, tensors[0].shape[1])
    assert native.can_run_native(tensors[0], schedule, None, None)
    truth = run(reference.prefix_attention, [x.double() for x in tensors], segments)
    actual = run(prefix_attention, tensors, segments, backend="cpu")
    for found, expected in zip(actual, truth, strict=True):
        assert (found.double() - expected).norm() <= 8e-3 * expected.norm()
        worst = (found.double() - expected).abs().max()
        assert worst <= 2e-2 * expected.abs().max()


def test_same_bits_for_any_number_of_threads() -> None:
    tensors = inputs(torch.bfloat16, (6, 2), (64, 64))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(prefix_attention, tensors, backend="cpu")
        torch.set_num_threads(max(2, threads))
        many = run(prefix_attention, tensors, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_poisoned_row_stays_in_its_row(dtype) -> None:
    """Blocks reach past the end of a segment; what lies there must not be multiplied in."""
    tensors = inputs(dtype, (2, 1), (64, 64))
    clean = run(prefix_attention, tensors, backend="cpu")
    poisoned = [x.clone() for x in tensors]
    for x in poisoned[:3]:
        x[:, 350:] = float("nan")
    dirty = run(prefix_attention, poisoned, backend="cpu")
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:, :347], b[:, :347])
        assert torch.isnan(b[:, 360:]).all()


def test_long_paths_and_plain_rows_go_elsewhere() -> None:
    query = torch.zeros(1, 1200, 8)
    plain = schedule_of(torch.tensor([(0, 600, 600), (600, 1200, 1200)]), 1200)
    long = schedule_of(torch.tensor([(0, 600, 1200), (600, 1200, 1200)]), 1200)
    assert not native.can_run_native(query, plain, None, None)
    assert not native.can_run_native(query, long, None, None)
    short = schedule_of(SEGMENTS, TOKENS)
    query = query[:, :TOKENS]
    assert native.can_run_native(query, short, None, None)
    assert native.can_run_native(query, short, 1000, None)
    assert not native.can_run_native(query, short, 100, None)
    assert not native.can_run_native(query, short, None, 5.0)
    assert not native.can_run_native(query.double(), short, None, None)


def test_matrix_tiles_lift_the_limit_for_bf16(monkeypatch) -> None:
    segments = torch.tensor([(0, 600, 1200), (600, 1200, 1200)])
    schedule, query = schedule_of(segments, 1200), torch.zeros(1, 1200, 8)

    def runs(dtype: torch.dtype) -> bool:
        return native.can_run_native(query.to(dtype), schedule, None, None)

    monkeypatch.setattr(native.library(), "fastpost_simd", lambda: 3)
    assert runs(torch.bfloat16) and not runs(torch.float32)
    monkeypatch.setattr(native, "_MAX_PATH_ON_TILES", 1199)
    assert not runs(torch.bfloat16)
    monkeypatch.setattr(native, "_MAX_PATH_ON_TILES", 1200)
    monkeypatch.setattr(native, "_SIMD_LIMIT", 2)
    assert not runs(torch.bfloat16)
    monkeypatch.setattr(native, "_SIMD_LIMIT", -1)
    monkeypatch.setattr(native.library(), "fastpost_simd", lambda: 2)
    assert not runs(torch.bfloat16)


@pytest.mark.parametrize("in_one_call", [True, False], ids=["C++", "PyTorch"])
def test_paths_of_600_to_1600_tokens(in_one_call, monkeypatch) -> None:
    """The C++ kernel, whatever it runs on, and PyTorch's."""
    segments = torch.tensor(
        [(0, 600, 1900), (600, 1200, 1600), (1200, 1600, 1600), (1600, 1900, 1900)]
    )
    limit = 1600 if in_one_call else 0
    monkeypatch.setattr(native, "_MAX_PATH", limit)
    monkeypatch.setattr(native, "_MAX_PATH_ON_TILES", limit)
    tensors = inputs(torch.bfloat16, (2, 1), (64, 64), 1900)
    schedule = schedule_of(segments, 1900)
    assert native.can_run_native(tensors[0], schedule, None, None) == in_one_call
    truth = run(reference.prefix_attention, [x.double() for x in tensors], segments)
    actual = run(prefix_attention, tensors, segments, backend="cpu")
    for found, expected in zip(actual, truth, strict=True):
        assert (found.double() - expected).norm() <= 8e-3 * expected.norm()
