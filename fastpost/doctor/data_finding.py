"""What the data doctor says of a file: one finding a kind of mistake, with a row that shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["DataFinding", "shorten", "united"]

_SHOWN = 240


@dataclass(frozen=True)
class DataFinding:
    """A mistake in training data.

    Attributes:
        check: which check it is of, such as "roles".
        level: "error" ruins the run or stops it, "warning" may be meant, "note" names a situation.
        row: number of the first row that has it, from 0; None for what concerns them all.
        what: the mistake in one sentence.
        text: the place in that row.
        fix: what to do.
        rows: how many of the rows looked at have it.
    """

    check: str
    level: Literal["error", "warning", "note"]
    row: int | None
    what: str
    text: str
    fix: str
    rows: int = 1


def shorten(text: str) -> str:
    """A text's beginning and end where it is long."""
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"


def united(findings: Iterable[DataFinding]) -> list[DataFinding]:
    """One finding for all that say the same of different rows: the first, with their number.

    Errors come first, then warnings, then notes.
    """
    first: dict[tuple[str, str, str], DataFinding] = {}
    rows: dict[tuple[str, str, str], set[int | None]] = {}
    for finding in findings:
        key = (finding.check, finding.level, finding.what)
        first.setdefault(key, finding)
        rows.setdefault(key, set()).add(finding.row)
    order = ("error", "warning", "note")
    merged = [replace(f, rows=max(f.rows, len(rows[key]))) for key, f in first.items()]
    return sorted(merged, key=lambda finding: order.index(finding.level))
