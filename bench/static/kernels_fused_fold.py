"""The fold with its GEMM inside: no tile of logits in memory."""

from __future__ import annotations

from unittest import mock

from torch import Tensor

from bench.static.kernel_row import (
    EVERYTHING,
    MAX_HIDDEN,
    MAX_ROWS,
    MAX_VOCAB,
    TILE,
    VOCABS,
    WIDTHS,
    Arguments,
    Case,
    Cost,
    Kernel,
    floats,
    meta,
    target_ids,
)

__all__ = ["KERNELS"]

MODULE = "fastpost_kernels._fused_fold_triton"


def _fused_cost(args: Arguments) -> Cost:
    rows, width, vocab = args["rows"], args["width"], args["vocab"]
    parts: Tensor = args["parts_ptr"]
    moved = 2 * width * (rows + vocab) + 4 * parts.numel() + 12 * rows
    bias = 4 * vocab * args["HAS_BIAS"]
    return Cost(2 * rows * width * vocab, moved + bias, rows * vocab)


def _merge_cost(args: Arguments) -> Cost:
    parts: Tensor = args["parts_ptr"]
    state = 2 * 4 * args["rows"] * args["NUM_PARTS"]
    return Cost(0, 4 * parts.numel() + state, parts.numel())


def _fold(width: int, vocab: int, options: str, capability: int) -> None:
    from fastpost_kernels import _fused_fold_triton as fused
    from fastpost_kernels._vocab_passes import STATE_ROWS, LogitTransform

    everything = options.startswith(EVERYTHING)
    # Tensors on the meta device have no capability to ask for.
    with mock.patch.object(fused, "capability", lambda device: capability):
        fused.fold_products(
            meta(TILE, width), meta(vocab, width), floats(STATE_ROWS, TILE), target_ids(TILE), 0,
            floats(vocab) if everything else None,
            LogitTransform(1.0, 30.0, 0.7) if everything else LogitTransform(),
            meta(TILE, TILE), moments=everything, top1=everything,
        )  # fmt: skip


def _case(width: int, vocab: int, options: str) -> Case:
    def launch(capability: int) -> None:
        _fold(width, vocab, options, capability)

    return Case(f"M {TILE}, H {width}, V {vocab}, {options}", launch)


def _cases(second: str, *widths: int) -> tuple[Case, ...]:
    """Both kinds of options first; then the other sizes, whose code differs by divisibility."""
    first = (_case(WIDTHS[0], VOCABS[0], "statistics only"), _case(WIDTHS[0], VOCABS[0], second))
    return first + tuple(_case(width, VOCABS[1], second) for width in widths)


LIMITS = {
    "rows": MAX_ROWS,
    "vocab": MAX_VOCAB,
    "width": MAX_HIDDEN,
    "first_col": MAX_VOCAB,
    "stride_hidden": MAX_HIDDEN,
    "stride_weight": MAX_HIDDEN,
    "stride_parts": MAX_ROWS,
    "stride_state": MAX_ROWS,
    "targets_ptr": MAX_VOCAB,
    "ranges": 512,
    "group": 16,
    "blocks_per_range": MAX_VOCAB // 64,
    "program_id(0)": 16 * 512,
}

KERNELS = (
    Kernel(
        "linear_logprob", "fastpost", f"{MODULE}:_linear_logprob_fused_fold_kernel", True,
        _fused_cost, _cases(EVERYTHING, *WIDTHS[1:]), (), LIMITS,
    ),
    # The merge reads what the other left: few numbers, so it stores one at a time.
    Kernel(
        "linear_logprob", "fastpost", f"{MODULE}:_linear_logprob_merge_kernel", False,
        _merge_cost, _cases(f"{EVERYTHING}, statistics only"), (), LIMITS,
    ),
)  # fmt: skip
