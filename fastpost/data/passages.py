"""The texts of a row, each with its place, wherever they stand: columns, turns, content parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from fastpost.data.rows import DataError, Row

__all__ = ["Place", "passages", "place_name", "replace_passage", "require_columns_of"]

Place = tuple[str | int, ...]

# Keys of messages and content parts that name a kind and are no text.
_KINDS = frozenset({"role", "from", "type", "id", "tool_call_id"})


def passages(row: Row, columns: Collection[str] | None = None) -> Iterator[tuple[Place, str]]:
    """Every text of a row, in order.

    Args:
        row: texts may be nested in lists and dictionaries (`messages`, content parts).
        columns: top-level columns looked at; None for all.

    Yields:
        `(place, text)`; a place is the keys and indices that lead to the text.
    """
    for name, value in row.items():
        if columns is None or name in columns:
            yield from _walk((name,), value)


def _walk(place: Place, value: Any) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _walk((*place, index), part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in _KINDS:
                yield from _walk((*place, key), part)


def place_name(place: Place) -> str:
    """`("messages", 1, "content")` as `messages[1].content`."""
    name = str(place[0])
    for part in place[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name


def replace_passage(row: Row, place: Place, text: str) -> Row:
    """A copy of the row with another text at `place`; what is not on the way there is shared."""

    def replaced(value: Any, rest: Place) -> Any:
        if not rest:
            return text
        copy: Any = list(value) if isinstance(value, list) else dict(value)
        copy[rest[0]] = replaced(value[rest[0]], rest[1:])
        return copy

    return replaced(row, place)


def require_columns_of(row: Row, columns: Collection[str] | None, source: str) -> None:
    """Refuse a row that has none of `columns`, or no text at all where they are None.

    Raises:
        DataError: names what the row has.
    """
    if columns is not None and not set(columns) & row.keys():
        raise DataError(
            f"{source} has none of the columns {', '.join(sorted(columns))}; it has "
            f"{', '.join(row)}"
        )
    if next(passages(row, columns), None) is None:
        kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
        raise DataError(f"{source} has no text in its first row; its columns are {kinds or 'none'}")
