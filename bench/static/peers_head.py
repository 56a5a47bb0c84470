"""What TRL and Liger launch for log-probabilities and cross-entropy of a head."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from unittest import mock

from torch import Tensor

from bench.static.kernel_row import (
    ROWS,
    VOCABS,
    WIDTHS,
    Arguments,
    Case,
    Cost,
    Kernel,
    anywhere,
    by,
    floats,
    meta,
    target_ids,
)

__all__ = [
    "KERNELS",
    "LIGER_CE",
    "LIGER_GRPO",
    "LIGER_LOG_SOFTMAX",
    "LIGER_SCALE",
    "TRL_ROWS",
    "TRL_TILE",
]

TRL_TILE = "trl.kernels.chunked_logprob"
TRL_ROWS = "trl.kernels.logprob_entropy"
LIGER_CE = "liger_kernel.ops.cross_entropy:liger_cross_entropy_kernel"
LIGER_SCALE = "liger_kernel.ops.utils:element_mul_kernel"
LIGER_GRPO = "liger_kernel.ops.grpo_loss"
LIGER_LOG_SOFTMAX = f"{LIGER_GRPO}:_selective_log_softmax_kernel"


def _trl_cost(passes: int) -> Callable[[Arguments], Cost]:
    """Of TRL's passes over a tile or over whole rows of logits."""

    def cost(args: Arguments) -> Cost:
        tile: Tensor = args["mm_ptr"] if "mm_ptr" in args else args["logits_ptr"]
        return Cost(0, passes * tile.numel() * tile.itemsize + 48 * tile.shape[0], tile.numel())

    return cost


def _trl_tile(backward: bool) -> None:
    from trl.kernels import chunked_logprob as trl

    rows, cols = 4096, 32_768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    tile, row = meta(rows, cols), floats(rows)
    transform = {"logit_scale": 1.0, "softcap": 1.0, "inv_t": 1.0, "HAS_SOFTCAP": False}
    place = {"vocab_start": 0, "n_cols": cols, "BLOCK_SIZE": trl._BLOCK_SIZE}
    if backward:
        grid = (rows, math.ceil(cols / trl._BLOCK_SIZE))
        trl._backward_kernel[grid](
            tile, cols, target_ids(rows), row, row, row, row,
            HAS_LOGPROB_GRAD=True, HAS_ENTROPY_GRAD=False, **place, **transform,
        )  # fmt: skip
    else:
        flags = {f"HAS_{name.upper()}": False for name in trl.OPTIONAL_OUTPUTS}
        trl._forward_kernel[(rows,)](
            tile, cols, target_ids(rows), *[row] * 7, **flags, **place, **transform
        )


def _trl_rows(backward: bool, vocab: int) -> None:
    from trl.kernels.logprob_entropy import _LogProbEntropyFunction

    ctx = mock.Mock()
    logits, targets = meta(ROWS, vocab), target_ids(ROWS)
    _LogProbEntropyFunction.forward(ctx, logits, targets, 1.0, None)
    if backward:
        ctx.saved_tensors = ctx.save_for_backward.call_args.args
        _LogProbEntropyFunction.backward(ctx, floats(ROWS), None)


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
        X_ptr=meta(rows, vocab), X_stride=vocab, Y_ptr=target_ids(rows), Y_stride=1,
        weight_ptr=None, loss_ptr=floats(rows), z_loss_ptr=None, loss_stride=1,
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
        meta(ROWS, width), width, floats(), width, BLOCK_SIZE=8192, X_col_stride=1,
        num_warps=_liger_warps(capability),
    )  # fmt: skip


def _liger_log_softmax(vocab: int) -> None:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    fused_selective_log_softmax(meta(8, ROWS // 8 + 1, vocab), target_ids(8 * 1024).view(8, 1024))


def _liger_grpo(backward: bool, vocab: int) -> None:
    """The loss with clipped ratios, without a reference model."""
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    ctx, groups = mock.Mock(), 8
    answer = ROWS // groups
    logits = meta(groups, answer + 1, vocab)
    ids, advantages = target_ids(ROWS).view(groups, answer), floats(groups)
    GrpoLossFunction.forward(
        ctx, logits, floats(groups, answer), None, ids, advantages, None, 1.0, 0.0, 0.2, 0.2, False
    )
    if backward:
        ctx.saved_tensors = ctx.save_for_backward.call_args.args
        GrpoLossFunction.backward(ctx, floats())


def _liger_grpo_cost(passes: int) -> Callable[[Arguments], Cost]:
    def cost(args: Arguments) -> Cost:
        logits: Tensor = args["LOGITS"]
        return Cost(0, passes * logits.numel() * logits.itemsize + 28 * ROWS, logits.numel())

    return cost


def _log_softmax_cost(args: Arguments) -> Cost:
    logits: Tensor = args["LOGITS"]
    return Cost(0, logits.numel() * logits.itemsize + 12 * ROWS, logits.numel())


KERNELS = (
    Kernel(
        "linear_logprob", "trl", f"{TRL_TILE}:_forward_kernel", False,
        _trl_cost(1), (Case("tile 4096x32768", anywhere(_trl_tile, False)),),
    ),
    Kernel(
        "linear_logprob", "trl", f"{TRL_TILE}:_backward_kernel", False,
        _trl_cost(2), (Case("tile 4096x32768", anywhere(_trl_tile, True)),),
    ),
    Kernel(
        "linear_logprob", "trl", f"{TRL_ROWS}:_forward_kernel", False,
        _trl_cost(1), by(VOCABS, "V", lambda vocab: anywhere(_trl_rows, False, vocab)),
    ),
    Kernel(
        "linear_logprob", "trl", f"{TRL_ROWS}:_backward_kernel", False,
        _trl_cost(2), by(VOCABS, "V", lambda vocab: anywhere(_trl_rows, True, vocab)),
    ),
    Kernel(
        "linear_cross_entropy", "liger-kernel", LIGER_CE, False,
        _liger_cost, by(VOCABS, "V", lambda vocab: partial(_liger_cross_entropy, vocab)),
    ),
    Kernel(
        "linear_cross_entropy", "liger-kernel", LIGER_SCALE, False,
        _liger_cost, by(WIDTHS, "H", lambda width: partial(_liger_scale, width)),
    ),
    Kernel(
        "linear_logprob", "liger-kernel", LIGER_LOG_SOFTMAX, False,
        _log_softmax_cost, by(VOCABS, "V", lambda vocab: anywhere(_liger_log_softmax, vocab)),
    ),
    Kernel(
        "linear_logprob", "liger-kernel", f"{LIGER_GRPO}:_grpo_loss_fwd_kernel", False,
        _liger_grpo_cost(1), by(VOCABS, "V", lambda vocab: anywhere(_liger_grpo, False, vocab)),
    ),
    Kernel(
        "linear_logprob", "liger-kernel", f"{LIGER_GRPO}:_grpo_loss_bwd_kernel", False,
        _liger_grpo_cost(2), by(VOCABS, "V", lambda vocab: anywhere(_liger_grpo, True, vocab)),
    ),
)  # fmt: skip
