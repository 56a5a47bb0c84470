"""What a supervised run will learn from: scored share, truncation, rows without a label.

A mask that is all zeros trains on nothing, one that is all ones trains on the prompt; both give a
healthy-looking curve. So the mask is counted once, after truncation, before the first step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

IGNORE_INDEX = -100
# Rows looked at where a stream cannot be counted.
_STREAM_ROWS = 256


@dataclass(frozen=True)
class MaskReport:
    """Counts over a tokenised data set.

    Attributes:
        rows: rows counted; `is_sample` if they are only the beginning of a stream.
        tokens: tokens left after truncation.
        scored: tokens that carry a label after truncation (never the first of a row).
        truncated: rows cut by `max_length`.
        unlabelled: rows without any label after truncation; they are dropped.
        lengths: 50 %, 90 %, 99 % and 100 % quantile of row lengths before truncation.
    """

    rows: int
    tokens: int
    scored: int
    truncated: int
    unlabelled: int
    lengths: tuple[int, int, int, int]
    is_sample: bool

    def __str__(self) -> str:
        share = self.scored / max(1, self.tokens)
        which = f"the first {self.rows:,} rows" if self.is_sample else f"{self.rows:,} rows"
        return (
            f"{which}, {self.tokens:,} tokens, {share:.1%} scored; "
            f"{self.truncated:,} rows truncated, {self.unlabelled:,} left without a label; "
            "row length p50 {} p90 {} p99 {} max {}".format(*self.lengths)
        )


def count_mask(
    dataset: Any,
    max_length: int | None,
    truncation_mode: str,
    prompt_is_masked: bool,
    tokenizer: Any,
) -> MaskReport:
    """Count labels of a data set with `input_ids` and `labels`, as truncation will leave them.

    Args:
        dataset: rows before truncation.
        max_length: tokens a row is cut to, None for no cut.
        truncation_mode: "keep_start" or "keep_end".
        prompt_is_masked: the method masks prompts, so a fully scored data set is a mistake.
        tokenizer: decodes the example an error shows.

    Raises:
        ValueError: nothing is scored, or everything although prompts should be masked.
    """
    is_sample = not hasattr(dataset, "__len__")
    rows = islice(dataset, _STREAM_ROWS) if is_sample else _iterate(dataset)
    lengths, tokens, scored, truncated, unlabelled, example = [], 0, 0, 0, 0, None
    cut = slice(None)
    if max_length is not None:
        cut = slice(max_length) if truncation_mode == "keep_start" else slice(-max_length, None)
    for row in rows:
        labels = np.asarray(row["labels"])
        lengths.append(len(labels))
        kept = labels[cut]
        row_scored = int((kept[1:] != IGNORE_INDEX).sum())
        truncated += len(kept) < len(labels)
        unlabelled += row_scored == 0
        tokens += len(kept)
        scored += row_scored
        example = example if example is not None else row
    if example is None:
        raise ValueError("the data set is empty after tokenisation")
    if scored == 0:
        raise ValueError(
            "no token of the data set would be scored, so nothing would be learnt. Check the "
            "prompt/completion split, the assistant markers of the chat template and max_length "
            f"({max_length}). First row:\n{show_row(example, tokenizer)}"
        )
    if prompt_is_masked and scored == tokens - len(lengths) + lengths.count(0):
        raise ValueError(
            "every token of the data set would be scored although its prompts should be masked. "
            "Check the prompt/completion split and the assistant markers of the chat template. "
            f"First row:\n{show_row(example, tokenizer)}"
        )
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99, 1.0]).astype(int).tolist()
    return MaskReport(
        len(lengths), tokens, scored, truncated, unlabelled, tuple(quantiles), is_sample
    )


def show_row(row: dict[str, Any], tokenizer: Any) -> str:
    """The row's text with scored stretches between [[ and ]]."""
    parts, start = [], 0
    ids, labels = list(row["input_ids"]), list(row["labels"])
    for end in range(1, len(ids) + 1):
        if end < len(ids) and (labels[end] == IGNORE_INDEX) == (labels[start] == IGNORE_INDEX):
            continue
        text = tokenizer.decode(ids[start:end])
        parts.append(text if labels[start] == IGNORE_INDEX else f"[[{text}]]")
        start = end
    return "".join(parts)


def _iterate(dataset: Any) -> Iterable[dict[str, Any]]:
    return dataset.select_columns(["input_ids", "labels"]).with_format("numpy")


__all__ = ["MaskReport", "count_mask", "show_row"]
