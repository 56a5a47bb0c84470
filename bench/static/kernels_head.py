"""The passes over tiles of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.static.kernel_row import (
    EVERYTHING,
    MAX_HIDDEN,
    MAX_ROWS,
    TILE,
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
from bench.static.peers_head import (
    LIGER_CE,
    LIGER_GRPO,
    LIGER_LOG_SOFTMAX,
    LIGER_SCALE,
    TRL_ROWS,
    TRL_TILE,
)

__all__ = ["KERNELS"]

PASSES = "fastpost_kernels._vocab_passes_triton"


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


def _significant_cost(args: Arguments) -> Cost:
    tile: Tensor = args["tile_ptr"]
    rows, cols = tile.shape
    return Cost(0, tile.numel() * tile.itemsize + 4 * rows + cols, tile.numel())


def _tile(cols: int, everything: bool) -> dict[str, Any]:
    """Arguments of a pass over the first `cols` columns of a tile."""
    from fastpost_kernels._vocab_passes import COEF_ROWS, STATE_ROWS, LogitTransform

    return {
        "tile": meta(TILE, TILE)[:, :cols],
        "state": floats(STATE_ROWS, TILE),
        "coefs": floats(COEF_ROWS, TILE),
        "targets": target_ids(TILE),
        "bias": floats(cols) if everything else None,
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

    acc, tile, weight = floats(TILE, width), floats(TILE, 64), floats(64, width)
    multiply_accumulate(acc, tile, weight, None, floats(TILE))


def _significant(cols: int, _: str) -> None:
    from fastpost_kernels._vocab_passes_triton import significant

    significant(meta(TILE, TILE)[:, :cols], floats(TILE))


def _tile_cases(run: Callable[[int, str], None], *options: str) -> tuple[Case, ...]:
    """Full tiles are the same at every H and V; the last one of a vocabulary is narrower."""
    shapes = {f"tile {TILE}x{TILE}": TILE} | {
        f"last tile {TILE}x{vocab % TILE} of V {vocab}": vocab % TILE for vocab in VOCABS
    }
    return tuple(
        Case(f"{shape}, {chosen}", anywhere(run, cols, chosen))
        for shape, cols in shapes.items()
        for chosen in options
    )


KERNELS = (
    Kernel(
        "linear_logprob", "fastpost", f"{PASSES}:_linear_logprob_fold_kernel", False,
        _fold_cost, _tile_cases(_fold, "frozen head", EVERYTHING, "statistics only"),
        (
            f"{TRL_TILE}:_forward_kernel", f"{TRL_ROWS}:_forward_kernel", LIGER_CE,
            LIGER_LOG_SOFTMAX, f"{LIGER_GRPO}:_grpo_loss_fwd_kernel",
        ),
        {"stride_state": MAX_ROWS},
    ),
    Kernel(
        "linear_logprob", "fastpost", f"{PASSES}:_linear_logprob_gradient_kernel", False,
        _gradient_cost, _tile_cases(_gradient, "logprob", EVERYTHING),
        (
            f"{TRL_TILE}:_backward_kernel", f"{TRL_ROWS}:_backward_kernel", LIGER_CE,
            f"{LIGER_GRPO}:_grpo_loss_bwd_kernel",
        ),
        {"stride_coefs": MAX_ROWS},
    ),
    Kernel(
        "linear_logprob", "fastpost", f"{PASSES}:_linear_logprob_rescale_kernel", False,
        _rescale_cost, by(WIDTHS, "H", lambda width: anywhere(_rescale, width)), (LIGER_SCALE,),
        {"n_cols": MAX_HIDDEN},
    ),
    Kernel(
        "linear_logprob", "fastpost", f"{PASSES}:_linear_logprob_significant_kernel", False,
        _significant_cost, _tile_cases(_significant, "statistics only"),
    ),
)  # fmt: skip
