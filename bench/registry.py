"""The kernels, ours and their peers': where they are, how they are launched, what a launch costs.

A launch hands meta tensors to the host code that owns the kernel, or, where that reads data, calls
the kernel as it does: nothing here allocates or computes. Whoever reads the table decides what a
launch does; `bench.static` compiles it. What a launch costs is counted from its own arguments:

    flops   of the tensor cores, over visible pairs: not the masked parts of blocks, nor head sizes
            padded to a power of two
    bytes   every argument read or written once: what no cache can save
    items   logits, visible pairs or elements, to compare launches of different sizes by

Shapes: M rows, n columns of a tile of logits, H hidden, V vocabulary; Hq and Hk heads, N tokens, D
head size. Peers without Triton are not listed: Liger's preference losses and FlexAttention are made
by torch.compile on a GPU, FlashAttention is CUDA. Our RMSNorm and SwiGLU are C++ for CPUs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

__all__ = ["KERNELS", "Case", "Cost", "Kernel", "attention_segments", "find"]

WIDTHS = (4096, 5120, 8192)
VOCABS = (128_256, 151_936)
HEAD_SIZES = (128, 64, 96, 192, 256)
ROWS = 8192
TILE = 4096  # rows and columns of logits that the planner chooses at all of these shapes
EVERYTHING = "every option"

Arguments = Mapping[str, Any]


class Cost(NamedTuple):
    flops: int
    bytes: int
    items: int


class Case(NamedTuple):
    """One launch at one shape; `launch` gets the GPU's capability: 90 for 9.0, -1 for AMD."""

    shape: str
    launch: Callable[[int], object]


class Kernel(NamedTuple):
    op: str
    package: str  # the distribution that brings it
    source: str  # module:function
    is_gemm: bool  # else it is bound by memory
    cost: Callable[[Arguments], Cost]
    cases: tuple[Case, ...]  # one shape comes first, of ours without and with every option
    peers: tuple[str, ...] = ()  # sources of kernels that do the same work

    @property
    def name(self) -> str:
        return self.source.partition(":")[2]

    def load(self) -> Any:
        """The jit function; raises ImportError if its package is not installed."""
        module, _, function = self.source.partition(":")
        return getattr(importlib.import_module(module), function)


def find(source: str) -> Kernel:
    """The row of `source`; raises KeyError."""
    return {kernel.source: kernel for kernel in KERNELS}[source]


def _anywhere(run: Callable[..., object], *args: Any) -> Callable[[int], object]:
    """A launch that is the same for every GPU."""
    return lambda _: run(*args)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _floats(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.float32)


def _targets(rows: int) -> Tensor:
    return _meta(rows, dtype=torch.int64)


def _fold_cost(args: Arguments) -> Cost:
    tile: Tensor = args["tile_ptr"]
    rows, cols = tile.shape
    # of the state: reference and sum; three moments; two maxima; written only: rescale, own logit
    state = 4 * (5 + 6 * args["HAS_MOMENTS"] + 5 * args["HAS_TOP1"])
    bias = 4 * cols * args["HAS_BIAS"]
    moved = tile.numel() * tile.itemsize * (1 + args["STORE_EXP"])
    return Cost(0, moved + rows * (8 + state) + bias, tile.numel())


def _gradient_cost(args: Arguments) -> Cost:
    tile: Tensor = args["tile_ptr"]
    rows, cols = tile.shape
    moved = 2 * tile.numel() * tile.itemsize
    return Cost(0, moved + rows * (8 + 4 * 5) + 4 * cols * args["HAS_BIAS"], tile.numel())


def _rescale_cost(args: Arguments) -> Cost:
    """Of the worst launch: every row is rescaled, where almost none is."""
    acc: Tensor = args["acc_ptr"]
    return Cost(0, 2 * acc.numel() * acc.itemsize + 4 * acc.shape[0], acc.numel())


def _tile(cols: int, everything: bool) -> dict[str, Any]:
    """Arguments of a pass over the first `cols` columns of a tile."""
    from fastpost_kernels._vocab_passes import COEF_ROWS, STATE_ROWS, LogitTransform

    return {
        "tile": _meta(TILE, TILE)[:, :cols],
        "state": _floats(STATE_ROWS, TILE),
        "coefs": _floats(COEF_ROWS, TILE),
        "targets": _targets(TILE),
        "bias": _floats(cols) if everything else None,
        "transform": LogitTransform(1.0, 30.0, 0.7) if everything else LogitTransform(),
    }


def _fold(cols: int, options: str) -> None:
    from fastpost_kernels._vocab_passes_triton import fold

    everything = options == EVERYTHING
    given = _tile(cols, everything)
    fold(
        given["tile"], given["state"], given["targets"], 0, given["bias"], given["transform"],
        moments=everything, top1=everything, store_exp=options != "statistics only",
    )  # fmt: skip


def _gradient(cols: int, options: str) -> None:
    from fastpost_kernels._vocab_passes_triton import gradient

    given = _tile(cols, options == EVERYTHING)
    gradient(given["tile"], given["coefs"], given["targets"], 0, given["bias"], given["transform"])


def _rescale(width: int) -> None:
    from fastpost_kernels._vocab_passes_triton import multiply_accumulate

    acc, tile, weight = _floats(TILE, width), _floats(TILE, 64), _floats(64, width)
    multiply_accumulate(acc, tile, weight, None, _floats(TILE))


def _tile_cases(run: Callable[[int, str], None], *options: str) -> tuple[Case, ...]:
    """Full tiles are the same at every H and V; the last one of a vocabulary is narrower."""
    shapes = {f"tile {TILE}x{TILE}": TILE} | {
        f"last tile {TILE}x{vocab % TILE} of V {vocab}": vocab % TILE for vocab in VOCABS
    }
    return tuple(
        Case(f"{shape}, {chosen}", _anywhere(run, cols, chosen))
        for shape, cols in shapes.items()
        for chosen in options
    )


def _trl_cost(passes: int) -> Callable[[Arguments], Cost]:
    """Of TRL's passes over a tile or over whole rows of logits."""

    def cost(args: Arguments) -> Cost:
        tile: Tensor = args["mm_ptr"] if "mm_ptr" in args else args["logits_ptr"]
        return Cost(0, passes * tile.numel() * tile.itemsize + 48 * tile.shape[0], tile.numel())

    return cost


def _trl_tile(backward: bool) -> None:
    from trl.kernels import chunked_logprob as trl

    rows, cols = 4096, 32_768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    tile, row = _meta(rows, cols), _floats(rows)
    transform = {"logit_scale": 1.0, "softcap": 1.0, "inv_t": 1.0, "HAS_SOFTCAP": False}
    place = {"vocab_start": 0, "n_cols": cols, "BLOCK_SIZE": trl._BLOCK_SIZE}
    if backward:
        grid = (rows, math.ceil(cols / trl._BLOCK_SIZE))
        trl._backward_kernel[grid](
            tile, cols, _targets(rows), row, row, row, row,
            HAS_LOGPROB_GRAD=True, HAS_ENTROPY_GRAD=False, **place, **transform,
        )  # fmt: skip
    else:
        flags = {f"HAS_{name.upper()}": False for name in trl.OPTIONAL_OUTPUTS}
        trl._forward_kernel[(rows,)](
            tile, cols, _targets(rows), *[row] * 7, **flags, **place, **transform
        )


def _trl_rows(backward: bool, vocab: int) -> None:
    from trl.kernels.logprob_entropy import _LogProbEntropyFunction

    ctx = mock.Mock()
    logits, targets = _meta(ROWS, vocab), _targets(ROWS)
    _LogProbEntropyFunction.forward(ctx, logits, targets, 1.0, None)
    if backward:
        ctx.saved_tensors = ctx.save_for_backward.call_args.args
        _LogProbEntropyFunction.backward(ctx, _floats(ROWS), None)


def _liger_cost(args: Arguments) -> Cost:
    logits: Tensor = args["X_ptr"]
    return Cost(0, 2 * logits.numel() * logits.itemsize + 16 * logits.shape[0], logits.numel())


def _liger_warps(capability: int) -> int:
    """As its host code chooses by torch's build: 1,024 threads on both makes of GPU."""
    return 32 if capability > 0 else 16


def _liger_cross_entropy(vocab: int, capability: int) -> None:
    """As fused_linear_cross_entropy_forward at H 4096, where a chunk of 8192 rows has 256."""
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    from liger_kernel.ops.fused_linear_cross_entropy import MAX_FUSED_SIZE

    rows = 256
    liger_cross_entropy_kernel[(rows,)](
        X_ptr=_meta(rows, vocab), X_stride=vocab, Y_ptr=_targets(rows), Y_stride=1,
        weight_ptr=None, loss_ptr=_floats(rows), z_loss_ptr=None, loss_stride=1,
        token_accuracy_ptr=None, token_accuracy_stride=0, predicted_tokens_ptr=None,
        predicted_tokens_stride=0, n_cols=vocab, n_non_ignore=ROWS, sum_non_ignore_weight=ROWS,
        weight_sum=0.0, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
        reduction="mean", softcap=None, RETURN_Z_LOSS=False, RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False, HAS_WEIGHT=False, HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=True, BLOCK_SIZE=MAX_FUSED_SIZE,
        num_warps=_liger_warps(capability),
    )  # fmt: skip


def _liger_scale(width: int, capability: int) -> None:
    from liger_kernel.ops.utils import element_mul_kernel

    element_mul_kernel[(ROWS,)](
        _meta(ROWS, width), width, _floats(), width, BLOCK_SIZE=8192, X_col_stride=1,
        num_warps=_liger_warps(capability),
    )  # fmt: skip


def _liger_log_softmax(vocab: int) -> None:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    fused_selective_log_softmax(_meta(8, ROWS // 8 + 1, vocab), _targets(8 * 1024).view(8, 1024))


def _log_softmax_cost(args: Arguments) -> Cost:
    logits: Tensor = args["LOGITS"]
    return Cost(0, logits.numel() * logits.itemsize + 12 * ROWS, logits.numel())


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


def _attention(size: int, everything: bool, backward: bool, capability: int) -> None:
    from fastpost_kernels import _prefix_triton as host
    from fastpost_kernels._prefix_regions import Scoring
    from fastpost_kernels._prefix_segments import schedule_of

    schedule = schedule_of(attention_segments(), PROMPT + ANSWERS * ANSWER)
    scoring = Scoring(size**-0.5, 1024 if everything else None, 50.0 if everything else None)
    query, key, value = (
        _meta(int(attention_segments()[0, 2]), heads, size).transpose(0, 1)
        for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    )
    sinks = _meta(QUERY_HEADS) if everything else None
    # Tensors on the meta device have no capability to ask for.
    with mock.patch.object(host, "_capability", lambda device: capability):
        if backward:
            lse = _floats(*query.shape[:2])
            host.backward_triton(query, query, key, value, query, lse, schedule, scoring)
        else:
            host.forward_triton(query, key, value, sinks, schedule, scoring)


def _attention_cases(backward: bool) -> tuple[Case, ...]:
    return tuple(
        Case(
            f"D {size}" + ", softcap and window" * everything,
            partial(_attention, size, everything, backward),
        )
        for size in HEAD_SIZES
        for everything in (False, True)
    )


NF4_SHAPE = (14_336, 4096)
QUANT_BLOCK = 64


def _nf4(quantize: bool) -> None:
    from bitsandbytes.backends.triton import kernels_4bit as bnb

    weight = _meta(*NF4_SHAPE)
    blocks = weight.numel() // QUANT_BLOCK
    absmax, packed = _floats(blocks), _meta(weight.numel() // 2, 1, dtype=torch.uint8)
    if quantize:
        bnb.quantize_4bit_blockwise_triton(
            weight, QUANT_BLOCK, "nf4", blocks, absmax, weight.numel(), packed
        )
    else:
        bnb.dequantize_4bit_impl(packed, absmax, QUANT_BLOCK, "nf4", weight.dtype, weight)


def _nf4_cost(args: Arguments) -> Cost:
    count = math.prod(NF4_SHAPE)
    return Cost(0, count * 2 + count // 2 + 4 * count // QUANT_BLOCK, count)


def _adam() -> None:
    from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_impl

    weight, state = _meta(*NF4_SHAPE), _meta(*NF4_SHAPE, dtype=torch.uint8)
    absmax, code = _floats(weight.numel() // 256), _floats(256)
    optimizer_update_8bit_blockwise_impl(
        "adam", weight, weight, state, state, 0.9, 0.999, 0.0, 0.0, 1e-8, 10, 1e-6,
        code, code, absmax, absmax, 0.01,
    )  # fmt: skip


def _adam_cost(args: Arguments) -> Cost:
    """Parameter and two 8-bit states read and written, gradient read, two scales a block."""
    count = math.prod(NF4_SHAPE)
    return Cost(0, count * (2 * 2 + 2 + 2 * 2) + 16 * count // 256, count)


PASSES = "fastpost_kernels._vocab_passes_triton"
ATTENTION = "fastpost_kernels._prefix_kernels"
TRL_TILE = "trl.kernels.chunked_logprob"
TRL_ROWS = "trl.kernels.logprob_entropy"
LIGER_CE = "liger_kernel.ops.cross_entropy:liger_cross_entropy_kernel"
LIGER_SCALE = "liger_kernel.ops.utils:element_mul_kernel"
LIGER_LOG_SOFTMAX = "liger_kernel.ops.grpo_loss:_selective_log_softmax_kernel"
BNB = "bitsandbytes.backends.triton"


def _by(
    values: tuple[int, ...], letter: str, launch: Callable[[int], Callable[[int], object]]
) -> tuple[Case, ...]:
    return tuple(Case(f"{letter} {value}", launch(value)) for value in values)


KERNELS = (
    Kernel(
        "linear_logprob", "fastpost", f"{PASSES}:_linear_logprob_fold_kernel", False,
        _fold_cost, _tile_cases(_fold, "frozen head", EVERYTHING, "statistics only"),
        (f"{TRL_TILE}:_forward_kernel", f"{TRL_ROWS}:_forward_kernel", LIGER_CE, LIGER_LOG_SOFTMAX),
    ),
    Kernel(
        "linear_logprob", "fastpost", f"{PASSES}:_linear_logprob_gradient_kernel", False,
        _gradient_cost, _tile_cases(_gradient, "logprob", EVERYTHING),
        (f"{TRL_TILE}:_backward_kernel", f"{TRL_ROWS}:_backward_kernel", LIGER_CE),
    ),
    Kernel(
        "linear_logprob", "fastpost", f"{PASSES}:_linear_logprob_rescale_kernel", False,
        _rescale_cost, _by(WIDTHS, "H", lambda width: _anywhere(_rescale, width)), (LIGER_SCALE,),
    ),
    Kernel(
        "prefix_attention", "fastpost", f"{ATTENTION}:prefix_attention_fwd_kernel", True,
        _forward_cost, _attention_cases(False),
    ),
    Kernel(
        "prefix_attention", "fastpost", f"{ATTENTION}:prefix_attention_bwd_query_kernel", True,
        _grad_query_cost, _attention_cases(True),
    ),
    Kernel(
        "prefix_attention", "fastpost", f"{ATTENTION}:prefix_attention_bwd_key_kernel", True,
        _grad_key_cost, _attention_cases(True),
    ),
    Kernel(
        "linear_logprob", "trl", f"{TRL_TILE}:_forward_kernel", False,
        _trl_cost(1), (Case("tile 4096x32768", _anywhere(_trl_tile, False)),),
    ),
    Kernel(
        "linear_logprob", "trl", f"{TRL_TILE}:_backward_kernel", False,
        _trl_cost(2), (Case("tile 4096x32768", _anywhere(_trl_tile, True)),),
    ),
    Kernel(
        "linear_logprob", "trl", f"{TRL_ROWS}:_forward_kernel", False,
        _trl_cost(1), _by(VOCABS, "V", lambda vocab: _anywhere(_trl_rows, False, vocab)),
    ),
    Kernel(
        "linear_logprob", "trl", f"{TRL_ROWS}:_backward_kernel", False,
        _trl_cost(2), _by(VOCABS, "V", lambda vocab: _anywhere(_trl_rows, True, vocab)),
    ),
    Kernel(
        "linear_cross_entropy", "liger-kernel", LIGER_CE, False,
        _liger_cost, _by(VOCABS, "V", lambda vocab: partial(_liger_cross_entropy, vocab)),
    ),
    Kernel(
        "linear_cross_entropy", "liger-kernel", LIGER_SCALE, False,
        _liger_cost, _by(WIDTHS, "H", lambda width: partial(_liger_scale, width)),
    ),
    Kernel(
        "linear_logprob", "liger-kernel", LIGER_LOG_SOFTMAX, False,
        _log_softmax_cost, _by(VOCABS, "V", lambda vocab: _anywhere(_liger_log_softmax, vocab)),
    ),
    Kernel(
        "nf4_linear", "bitsandbytes", f"{BNB}.kernels_4bit:dequant_nf4_kernel", False,
        _nf4_cost, (Case("14336x4096", _anywhere(_nf4, False)),),
    ),
    Kernel(
        "nf4_linear", "bitsandbytes", f"{BNB}.kernels_4bit:quantize_nf4_blockwise_kernel", False,
        _nf4_cost, (Case("14336x4096", _anywhere(_nf4, True)),),
    ),
    Kernel(
        "adamw_8bit", "bitsandbytes",
        f"{BNB}.kernels_optim:_optimizer_update_2state_8bit_blockwise_triton_kernel", False,
        _adam_cost, (Case("14336x4096", _anywhere(_adam)),),
    ),
)  # fmt: skip
