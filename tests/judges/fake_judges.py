"""Chat models that judge by what stands between the marks, as a good judge would."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from fastpost.judges.judge import Judge

_MARKED = re.compile(
    r"^\[(?P<name>\w+) (?P<mark>[0-9a-f]{32})\]\n(?P<text>.*?)\n\[end of (?P=name) (?P=mark)\]$",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"between marks with the number ([0-9a-f]{32})\.")


def texts_of(message: str) -> dict[str, str]:
    """The texts under judgement, found by the number that the instructions name."""
    number = _NUMBER.search(message)
    assert number is not None
    return {m["name"]: m["text"] for m in _MARKED.finditer(message) if m["mark"] == number[1]}


class FakeModel:
    """Replies with `speak(texts, seed)`; keeps the messages it saw."""

    def __init__(self, speak: Callable[[dict[str, str], int], str | None], name: str) -> None:
        self.identity = {"model": name}
        self.speak = speak
        self.messages: list[str] = []

    def __call__(self, conversations: Sequence[Any], *, seed: int) -> list[str | None]:
        new = [conversation[-1]["content"] for conversation in conversations]
        self.messages += new
        return [self.speak(texts_of(message), seed) for message in new]


def grader(points: Callable[[str], int | None], name: str = "grader", **options: Any) -> Judge:
    """Grades by the answer's text; None babbles."""

    def speak(texts: dict[str, str], seed: int) -> str:
        found = points(texts["answer"])
        return "Well..." if found is None else json.dumps({"grade": found})

    return Judge(FakeModel(speak, name), **options)


def comparer(better: Callable[[str, str], str], name: str = "comparer", **options: Any) -> Judge:
    """Compares by the texts of A and B."""

    def speak(texts: dict[str, str], seed: int) -> str:
        return json.dumps({"better": better(texts["answer_A"], texts["answer_B"])})

    return Judge(FakeModel(speak, name), **options)
