"""Any row of a source by its number, without holding the rows: 8 bytes a row of JSONL in memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastpost.data.rows import DataError, Row, load_table, name_of, parse_line, require_file

__all__ = ["RowStore", "open_store"]


class RowStore(Protocol):
    """Rows by number, from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...

    def digest(self) -> str:
        """Changes when the source does."""


class LineStore:
    """Rows of a JSONL file, read where they begin.

    Raises:
        DataError: a row that is no JSON object, when it is read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        starts, numbers, at = [], [], 0
        digest = hashlib.sha256()
        try:
            self._file = path.open("rb")
            for number, line in enumerate(self._file, start=1):
                if not line.isspace():
                    starts.append(at)
                    numbers.append(number)
                at += len(line)
                digest.update(line)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        self._starts = np.array([*starts, at], np.int64)
        self._numbers = np.array(numbers, np.int64)
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Row:
        start, end = self._starts[number : number + 2].tolist()
        # Not seek and read: forked loaders share the place that seek sets.
        line = os.pread(self._file.fileno(), end - start, start)
        return parse_line(str(self._path), int(self._numbers[number]), line)

    def digest(self) -> str:
        return self._digest


class TableStore:
    """Rows of a `datasets.Dataset`, mapped from disk."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> Row:
        return self._table[int(number)]

    def digest(self) -> str:
        return f"{self._table._fingerprint}-{len(self._table)}"


def open_store(source: Any, split: str = "train") -> RowStore:
    """A source as `read_batches` takes it (but a list of rows), by row number.

    Raises:
        DataError: there is no such data, it cannot be loaded, or it has no row.
    """
    store: RowStore
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    if path is not None and path.suffix.lower() == ".jsonl":
        require_file(path)
        store = LineStore(path)
    else:
        store = TableStore(load_table(source, split))
    if len(store) == 0:
        raise DataError(f"{name_of(source)} has no rows")
    return store
