"""Does the data set have the columns a method needs? Asked before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


def column_names(dataset: Any) -> list[str]:
    """Columns of a `datasets` data set, looking at the first row where the set does not say.

    Raises:
        ValueError: the data set has no row.
    """
    names = getattr(dataset, "column_names", None)
    if names is not None:
        return list(names)
    for row in dataset:
        return list(row)
    raise ValueError("the data set is empty: it has no row to read columns from")


def require_columns(columns: Iterable[str], choices: Sequence[Sequence[str]], method: str) -> None:
    """Refuse a data set that has none of the column sets in `choices`.

    Raises:
        ValueError: names the columns found, the sets that would do, and likely misspellings.
    """
    found = list(columns)
    if any(set(choice) <= set(found) for choice in choices):
        return
    wanted = " or ".join("+".join(choice) for choice in choices)
    hints = []
    for name in {name for choice in choices for name in choice} - set(found):
        close = get_close_matches(name, found, n=1, cutoff=0.7)
        if close:
            hints.append(f"rename '{close[0]}' to '{name}'")
    hint = f" ({'; '.join(sorted(hints))}?)" if hints else ""
    raise ValueError(f"{method} needs the columns {wanted}; the data set has {found}{hint}")


def require_rows(dataset: Any, name: str) -> None:
    """Refuse a data set without rows.

    Raises:
        ValueError: names the data set.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name} is empty; expected at least one row")


__all__ = ["column_names", "require_columns", "require_rows"]
