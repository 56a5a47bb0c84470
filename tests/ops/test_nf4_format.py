"""4-bit NormalFloat bytes against bitsandbytes, both ways; unpacking on every backend."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from fastpost_kernels import Nf4Weight, nf4_dequantize, nf4_quantize
from fastpost_kernels._nf4_format import absmax_of, dequantize_plain
from fastpost_kernels._nf4_unpack import WeightTiles, unpack
from fastpost_kernels.testing import Canary

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(64, 576), (33, 70), (7, 31), (1, 2)]


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes").functional


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Random, with a row of zeros, an outlier and a denormal."""
    weight = 0.02 * torch.randn(shape)
    weight[-1] = 0
    weight[0, 0], weight[0, 1] = 3.0, 1e-39
    return weight.to(dtype)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_quantises_to_the_same_bytes(bnb, shape, dtype, block_size, double_quant) -> None:
    weight = weight_of(shape, dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    ours = nf4_quantize(weight, block_size=block_size, double_quant=double_quant)
    assert torch.equal(ours.packed, packed) and ours.packed.shape == packed.shape
    assert torch.equal(ours.absmax, state.absmax) and ours.absmax.dtype == state.absmax.dtype
    if double_quant:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.nested_code, state.state2.code)
        assert torch.equal(ours.offset, state.offset)


def test_many_absmax_are_rounded_alike(bnb) -> None:
    """Double quantisation of 200,000 blocks: borders between two levels included."""
    weight = torch.randn(200_000, 32)
    _, state = bnb.quantize_4bit(weight, blocksize=32, compress_statistics=True, quant_type="nf4")
    assert torch.equal(nf4_quantize(weight, block_size=32).absmax, state.absmax)


def test_pieces_are_the_whole(monkeypatch) -> None:
    weight = weight_of((37, 331), FP32)
    whole = nf4_quantize(weight, block_size=64)
    monkeypatch.setattr("fastpost_kernels._nf4_format._PIECE", 4096)
    for got, expected in zip(nf4_quantize(weight, block_size=64), whole, strict=True):
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(expected))


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("shape", "block_size"), [((64, 576), 64), ((40, 1024), 256)])
def test_dequantises_their_bytes(bnb, shape, block_size, dtype, double_quant, storage) -> None:
    packed, state = bnb.quantize_4bit(
        weight_of(shape, dtype),
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type="nf4",
        quant_storage=storage,
    )
    nested = state.state2
    theirs = Nf4Weight(
        packed,
        state.absmax,
        shape,
        block_size,
        nested.absmax if double_quant else None,
        nested.code if double_quant else None,
        state.offset if double_quant else None,
    )
    assert torch.equal(nf4_dequantize(theirs, dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("block_size", [32, 64, 512])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_every_backend_unpacks_alike(backend: str, block_size: int, dtype, shape) -> None:
    """Blocks that straddle rows too; where bitsandbytes' CPU kernel takes the wrong absmax."""
    weight = nf4_quantize(weight_of(shape, FP32), block_size=block_size)
    plain = dequantize_plain(
        weight.packed.view(-1), absmax_of(weight), shape, weight.block_size, FP32
    )
    got = nf4_dequantize(weight, dtype, backend=backend)
    if (backend, dtype) == ("triton", BF16):  # the interpreter cuts bits off where a GPU rounds
        torch.testing.assert_close(got.float(), plain, rtol=2**-7, atol=0)
    else:
        assert torch.equal(got, plain.to(dtype))


@pytest.mark.parametrize("level", [0, 1, 2], ids=["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_every_instruction_set(dtype: torch.dtype, level: int) -> None:
    """Nothing outside of the result is written."""
    for shape in ((9, 100), (3, 5), (2, 192)):
        weight = nf4_quantize(torch.randn(shape), block_size=32)
        bytes_, absmax = weight.packed.view(-1), absmax_of(weight)
        guarded = Canary(torch.full(shape, float("nan"), dtype=dtype), strides=(shape[1], 1))
        part = (slice(0, shape[0]), slice(0, shape[1]))
        unpack(weight, part, guarded.inner, "cpp", level)
        guarded.assert_untouched()
        assert torch.equal(
            guarded.inner, dequantize_plain(bytes_, absmax, shape, 32, FP32).to(dtype)
        )


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("shape", [(10, 256), (6, 70)])
def test_tiles_are_the_weight(monkeypatch, backend: str, shape: tuple[int, int]) -> None:
    monkeypatch.setattr("fastpost_kernels._nf4_unpack.TILE_BYTES", {"cpu": 2048})
    weight = nf4_quantize(torch.randn(shape), block_size=64)
    whole = nf4_dequantize(weight, FP32)
    arguments = (weight, FP32, backend)
    rows, cols = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    for part, tile in WeightTiles(*arguments).by_rows():
        rows[part] = tile
    for part, tile in WeightTiles(*arguments).by_columns():
        cols[:, part] = tile
    assert torch.equal(rows, whole) and torch.equal(cols, whole)
    tiles = len(list(WeightTiles(*arguments).by_rows()))
    assert (tiles > 1) == (shape[1] % 64 == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 48}, "blocks of 48"),
        ({"shape": (4, 66)}, "132 bytes and 5 absmax, got 128 and 4"),
        ({"nested_absmax": None}, "nested_absmax missing"),
        ({"offset": None}, "double quantisation needs"),
        ({"nested_code": torch.zeros(16)}, r"nested_code must be \[256\]"),
    ],
)
def test_refuses_bytes_that_do_not_fit(change, message: str) -> None:
    weight = nf4_quantize(torch.randn(4, 64))
    with pytest.raises(ValueError, match=message):
        nf4_dequantize(weight._replace(**change))


def test_refuses_what_cannot_be_quantised() -> None:
    with pytest.raises(ValueError, match=r"expected weight \[N, K\]"):
        nf4_quantize(torch.randn(3))
    with pytest.raises(TypeError, match="float64"):
        nf4_quantize(torch.randn(3, 4).double())
    with pytest.raises(ValueError, match="block_size must be one of"):
        nf4_quantize(torch.randn(3, 4), block_size=100)
    with pytest.raises(ValueError, match="do not fill"):
        nf4_quantize(torch.randn(1, 2), storage=BF16)
