"""What a judge is asked, and the one form of reply that counts.

| task | reply | value |
|---|---|---|
| `Grade` | {"grade": 7} | 0.7 |
| `Rubric` | {"accuracy": 9, "tone": 4} | {"accuracy": 0.9, "tone": 0.4} |
| `Propositions` | {"1": true, "2": false} | (True, False) |
| `Comparison` | {"better": "A"} | 1.0; "B" is 0.0 and "tie" 0.5 |

A reply counts if it is that JSON object and nothing else. A code fence around it and a reasoning
block `<think>…</think>` before it are taken off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

__all__ = ["Comparison", "Criterion", "Grade", "Propositions", "Rubric", "Task", "read_object"]

_BEST = 10
_SHOWN = 200
_WEIGHED_STATEMENTS = 4  # 16 replies
_THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCED = re.compile(r"\A```(?:json)?\s*\n(.*)\n\s*```\Z", re.DOTALL)


class Task(Protocol):
    """A question about a few texts.

    Attributes:
        texts: names of the texts that a row must hold.
        instructions: what to judge, before the texts.
        form: how to reply, after them.
        choices: every reply that counts, where these are few.
    """

    @property
    def texts(self) -> tuple[str, ...]: ...

    @property
    def instructions(self) -> str: ...

    @property
    def form(self) -> str: ...

    @property
    def choices(self) -> tuple[str, ...] | None:
        """Every reply that counts; None where they are too many to weigh each."""
        ...

    def value(self, reply: str) -> Any:
        """What a reply says.

        Raises:
            ValueError: it has not the form asked for.
        """
        ...


@dataclass(frozen=True)
class Grade:
    """One grade in [0, 1] for an answer, by criteria in words."""

    criteria: str

    def __post_init__(self) -> None:
        _require_text(self.criteria, "criteria")

    @property
    def texts(self) -> tuple[str, ...]:
        return ("prompt", "answer")

    @property
    def instructions(self) -> str:
        return f"Grade the answer to the prompt by these criteria: {self.criteria}"

    @property
    def form(self) -> str:
        return f'Reply with {{"grade": n}} alone, n a whole number of 0 (worst) to {_BEST} (best).'

    @property
    def choices(self) -> tuple[str, ...] | None:
        return tuple(f'{{"grade": {n}}}' for n in range(_BEST + 1))

    def value(self, reply: str) -> float:
        return _grade(read_object(reply, ["grade"])["grade"])


@dataclass(frozen=True)
class Criterion:
    """One line of a rubric. `weight` is its share in the mean, relative to the others."""

    name: str
    description: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require_text(self.name, "a criterion's name")
        _require_text(self.description, f"the description of {self.name}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"criterion {self.name}: weight is {self.weight}; give more than 0")


@dataclass(frozen=True)
class Rubric:
    """A grade in [0, 1] for each of several criteria, in one question."""

    criteria: tuple[Criterion, ...]

    def __post_init__(self) -> None:
        names = [criterion.name for criterion in self.criteria]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"the criteria are {names}; give at least one, each name once")

    @property
    def texts(self) -> tuple[str, ...]:
        return ("prompt", "answer")

    @property
    def instructions(self) -> str:
        lines = [f"- {json.dumps(c.name)}: {c.description}" for c in self.criteria]
        return "Grade the answer to the prompt by each of these criteria:\n" + "\n".join(lines)

    @property
    def form(self) -> str:
        keys = ", ".join(f"{json.dumps(c.name)}: n" for c in self.criteria)
        return f"Reply with {{{keys}}} alone, each n a whole number of 0 (worst) to {_BEST} (best)."

    @property
    def choices(self) -> tuple[str, ...] | None:
        return None

    def value(self, reply: str) -> dict[str, float]:
        names = [criterion.name for criterion in self.criteria]
        found = read_object(reply, names)
        return {name: _grade(found[name]) for name in names}

    def mean(self, grades: dict[str, float]) -> float:
        """Σ w_c · grade_c / Σ w_c."""
        total = sum(c.weight for c in self.criteria)
        return sum(c.weight * grades[c.name] for c in self.criteria) / total


@dataclass(frozen=True)
class Propositions:
    """Whether each of several statements about an answer is true, in one question."""

    statements: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.statements:
            raise ValueError("no statements; give at least one")
        for statement in self.statements:
            _require_text(statement, "a statement")

    @property
    def texts(self) -> tuple[str, ...]:
        return ("prompt", "answer")

    @property
    def instructions(self) -> str:
        lines = [f"{number}. {text}" for number, text in enumerate(self.statements, 1)]
        return "Which of these statements about the answer to the prompt are true?\n" + "\n".join(
            lines
        )

    @property
    def form(self) -> str:
        keys = ", ".join(f'"{number}": t' for number in range(1, len(self.statements) + 1))
        return f"Reply with {{{keys}}} alone, each t true or false."

    @property
    def choices(self) -> tuple[str, ...] | None:
        count = len(self.statements)
        if count > _WEIGHED_STATEMENTS:
            return None
        names = [str(number) for number in range(1, count + 1)]
        return tuple(
            json.dumps(dict(zip(names, values, strict=True)))
            for values in product((True, False), repeat=count)
        )

    def value(self, reply: str) -> tuple[bool, ...]:
        names = [str(number) for number in range(1, len(self.statements) + 1)]
        found = read_object(reply, names)
        values = tuple(found[name] for name in names)
        if not all(isinstance(value, bool) for value in values):
            raise ValueError(f"expected true or false for each statement, got {found}")
        return values


@dataclass(frozen=True)
class Comparison:
    """Which of two answers is better; `Judge.prefer` asks it in both orders."""

    criteria: str

    def __post_init__(self) -> None:
        _require_text(self.criteria, "criteria")

    @property
    def texts(self) -> tuple[str, ...]:
        return ("prompt", "answer_A", "answer_B")

    @property
    def instructions(self) -> str:
        return f"Which answer to the prompt is better by these criteria: {self.criteria}"

    @property
    def form(self) -> str:
        return 'Reply with {"better": "A"}, {"better": "B"} or {"better": "tie"} alone.'

    @property
    def choices(self) -> tuple[str, ...] | None:
        return tuple(f'{{"better": "{name}"}}' for name in ("A", "B", "tie"))

    def value(self, reply: str) -> float:
        better = read_object(reply, ["better"])["better"]
        if better not in ("A", "B", "tie"):
            raise ValueError(f"better is {better!r}; expected A, B or tie")
        return {"A": 1.0, "B": 0.0, "tie": 0.5}[better]


def read_object(reply: str, keys: Sequence[str]) -> dict[str, Any]:
    """The JSON object that a reply consists of.

    Raises:
        ValueError: something else, other keys than `keys`, or one of them twice.
    """
    text = _THINKING.sub("", reply).strip()
    fenced = _FENCED.match(text)
    try:
        found = json.loads(fenced[1] if fenced else text, object_pairs_hook=_once_each)
    except RecursionError:
        raise ValueError(f"too deep to read: {reply[:_SHOWN]!r}") from None
    if not isinstance(found, dict) or set(found) != set(keys):
        raise ValueError(f"expected an object of {list(keys)}, got {reply[:_SHOWN]!r}")
    return found


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice in {[key for key, _ in pairs]}")
    return found


def _grade(value: Any) -> float:
    if type(value) is not int or not 0 <= value <= _BEST:
        raise ValueError(f"grade is {value!r}; expected a whole number of 0 to {_BEST}")
    return value / _BEST


def _require_text(text: Any, what: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} is {text!r}; give a text")
