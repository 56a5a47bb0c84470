"""Habits of answers that a model copies with its data, and rewrites that take them out.

Opening pleasantries ("Sure, I'd be happy to help!") and Markdown. Code, fenced or inline, is never
touched; an answer that would be left empty stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fastpost.data.passages import replace_passage
from fastpost.data.rows import Row
from fastpost.data.turns import turns

__all__ = ["HABITS", "NORMALISERS", "habits_of", "normalise_row", "opening"]

_OPENERS = (
    r"sure(?: thing)?|certainly|of course|absolutely|definitely|great(?: question)?|"
    r"good question|excellent question|that(?:'|’)s an? (?:great|good|excellent|interesting) "
    r"question|no problem|gladly|i(?:'|’)d be (?:happy|glad) to|i would be (?:happy|glad) to|"
    r"i(?:'|’)m (?:happy|glad) to|happy to help|thank you for (?:your|the) question|"
    r"as an ai(?: language model)?"
)
_HELP = (
    r"(?:here(?:'|’)?s|here (?:is|are)|i(?:'|’)?(?:ll|d| will| would| can)|let me|let(?:'|’)s|"
    r"happy to|glad to)"
)
# An opener alone ("Sure!"), with an offer ("Certainly, I can help with that."), then a second offer
# ("Here is the answer:"). A sentence that goes on otherwise ("Sure enough, ...") is content.
_OPENING = re.compile(
    rf"\s*(?:{_OPENERS})"
    rf"(?:\s*[!.:]|\s*[,;—–-]+\s*{_HELP}[^.!:\n]*[.!:]|(?<= to)\s[^.!:\n]*[.!:])"
    rf"(?:\s*(?:i(?:'|’)d|i would|i(?:'|’)m|i am) (?:be )?(?:happy|glad) to[^.!:\n]*[.!:])?"
    rf"(?:\s*{_HELP}[^.!:\n]*[!:])?\s+",
    re.IGNORECASE,
)
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_BOLD = re.compile(r"(?<![\w*])\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*(?![\w*])")
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*$", re.MULTILINE)
_BULLET = re.compile(r"^([ \t]*)[*+•](?=[ \t]+\S)", re.MULTILINE)
_ANY_BULLET = re.compile(r"^[ \t]*[-*+•][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*\d+[.)][ \t]+\S", re.MULTILINE)
_TABLE = re.compile(r"^\s*\|.*\|\s*\n\s*\|[\s:|-]+\|\s*$", re.MULTILINE)


def opening(text: str) -> str:
    """The pleasantry a text opens with, "" for none."""
    match = _OPENING.match(text)
    return match.group().strip() if match else ""


def _without_opening(text: str) -> str:
    return _OPENING.sub("", text, count=1)


def _outside_code(pattern: re.Pattern[str], replacement: str) -> Callable[[str], str]:
    def rewrite(text: str) -> str:
        parts = _CODE.split(text)  # every second one is code
        parts[::2] = [pattern.sub(replacement, part) for part in parts[::2]]
        return "".join(parts)

    return rewrite


NORMALISERS: dict[str, Callable[[str], str]] = {
    "opening": _without_opening,
    "bold": _outside_code(_BOLD, r"\1"),
    "headings": _outside_code(_HEADING, r"\1"),
    "bullets": _outside_code(_BULLET, r"\1-"),
}

HABITS: dict[str, Callable[[str], bool]] = {
    "opening": lambda text: bool(opening(text)),
    "bold": lambda text: _is_in_prose(_BOLD, text),
    "headings": lambda text: _is_in_prose(_HEADING, text),
    "bullets": lambda text: _is_in_prose(_ANY_BULLET, text),
    "numbered lists": lambda text: _is_in_prose(_NUMBERED, text),
    "tables": lambda text: _is_in_prose(_TABLE, text),
    "code blocks": lambda text: "```" in text,
}


def _is_in_prose(pattern: re.Pattern[str], text: str) -> bool:
    return any(pattern.search(part) for part in _CODE.split(text)[::2])


def habits_of(text: str) -> list[str]:
    """Names of the `HABITS` that an answer shows."""
    return [name for name, is_shown in HABITS.items() if is_shown(text)]


def normalise_row(row: Row, names: list[str]) -> Row:
    """The row with `NORMALISERS` applied to the assistant's texts, in the order of `names`."""
    for turn in turns(row) if names else ():
        if turn.role != "assistant":
            continue
        text = turn.text
        for name in names:
            text = NORMALISERS[name](text)
        if text != turn.text and text.strip():
            row = replace_passage(row, turn.place, text)
    return row
