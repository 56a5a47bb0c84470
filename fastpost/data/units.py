"""What an n-gram is made of: words, or a tokenizer's tokens, as integers.

A word is a run of letters and digits, NFKC-normalised and case-folded, so that punctuation,
quotation marks, line breaks, Markdown emphasis and full-width forms make no difference. Scripts
that write no spaces (Chinese, Japanese, Thai, ...) count every character as a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ids", "TokenUnits", "Units", "WordUnits", "word_spans", "words"]

Ids = NDArray[np.int32]

UNKNOWN = -1

_NO_SPACES = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han
    "\U00020000-\U0003ffff"
)
_MARKS = "\u0300-\u036f"  # an accent written apart belongs to its letter
_WORD = re.compile(rf"[{_NO_SPACES}]|(?:[^\W_{_NO_SPACES}]|[{_MARKS}])+")
_ASCII = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}


def words(text: str) -> list[str]:
    """Words of a text, normalised."""
    if text.isascii():
        return text.translate(_ASCII).split()
    found = _WORD.findall(text)
    # Joined, normalised and split again: one call instead of one a word. NUL stays what it is.
    joined = unicodedata.normalize("NFKC", "\0".join(found)).casefold()
    return joined.split("\0") if found else []


def word_spans(text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each of `words(text)`."""
    return [match.span() for match in _WORD.finditer(text)]


class Units(Protocol):
    """Texts to integer ids; equal units have equal ids, and `UNKNOWN` equals nothing."""

    name: str

    def learn(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text; unseen units get a new id."""

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, `UNKNOWN` for units never learnt."""

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Characters of each unit of a text."""


class WordUnits:
    """Words, numbered as they are learnt."""

    name = "words"

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def learn(self, texts: Sequence[str]) -> list[Ids]:
        numbers = self._numbers
        return [
            np.array([numbers.setdefault(w, len(numbers)) for w in words(text)], np.int32)
            for text in texts
        ]

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        look_up = self._numbers.get
        return [np.array(list(map(look_up, words(t), repeat(UNKNOWN))), np.int32) for t in texts]

    def spans(self, text: str) -> list[tuple[int, int]]:
        return word_spans(text)


class TokenUnits:
    """Tokens of a fast tokenizer, special tokens not added.

    Raises:
        ValueError: the tokenizer gives no character offsets.
    """

    name = "tokens"

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer "
                "(AutoTokenizer.from_pretrained(..., use_fast=True)), or words"
            )
        self._tokenizer = tokenizer

    def learn(self, texts: Sequence[str]) -> list[Ids]:
        return self.ids(texts)

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        found = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [np.array(ids, np.int32) for ids in found["input_ids"]]

    def spans(self, text: str) -> list[tuple[int, int]]:
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [tuple(span) for span in encoded["offset_mapping"]]


def stretches(positions: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive integers in sorted positions, as (first, last)."""
    if positions.size:
        cuts = np.flatnonzero(np.diff(positions) > 1)
        firsts = positions[np.r_[0, cuts + 1]]
        lasts = positions[np.r_[cuts, positions.size - 1]]
        yield from zip(firsts.tolist(), lasts.tolist(), strict=True)
