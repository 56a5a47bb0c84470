"""Files of rows that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastpost.data.rows import Batch, DataError, Row

__all__ = ["RowFile", "json_line", "row_file", "whole_file"]


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an error.

    Raises:
        DataError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    path = Path(path).expanduser()
    building: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        building = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        building.chmod(0o644)  # mkstemp makes files only their owner can read
        os.replace(building, path)
    except OSError as error:
        _remove(building)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk is full: {path} was not written and is as it was before; free some "
                f"space in {path.parent} or choose another output"
            ) from error
        raise DataError(f"{path} cannot be written: {error}") from error
    except BaseException:
        _remove(building)
        raise


def _remove(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)


def json_line(row: Row) -> bytes:
    """A row as a line of JSONL.

    Raises:
        DataError: a value that JSON has no form for.
    """
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    except TypeError as error:
        raise DataError(f"a row cannot be written as JSON ({error}); write .parquet") from None


class RowFile:
    """Rows written to an open file, as JSONL or Parquet."""

    def __init__(self, file: IO[bytes], is_parquet: bool) -> None:
        self._file = file
        self._is_parquet = is_parquet
        self._parquet: pq.ParquetWriter | None = None

    def write_batch(self, batch: Batch, kept: list[int], changed: dict[int, Row]) -> None:
        """Rows `kept` of a batch in order, those in `changed` (by place in it) as given there.

        Raises:
            DataError: rows whose columns do not fit those written before.
        """
        if not kept:
            return
        if batch.lines and not self._is_parquet:
            self._file.writelines(
                json_line(changed[i]) if i in changed else _ended(batch.lines[i][1]) for i in kept
            )
        elif batch.table is not None and self._is_parquet:
            table = batch.table.take(kept)
            if changed:
                rows = [changed.get(i, row) for i, row in zip(kept, table.to_pylist(), strict=True)]
                table = pa.Table.from_pylist(rows, schema=table.schema)
            self._write_table(table)
        else:
            rows = batch.rows()
            self.write_rows([changed.get(i, rows[i]) for i in kept])

    def write_rows(self, rows: list[Row]) -> None:
        """Rows as dictionaries; the first call decides the columns of a Parquet file.

        Raises:
            DataError: rows whose columns do not fit those written before.
        """
        if not self._is_parquet:
            self._file.writelines(map(json_line, rows))
            return
        try:
            self._write_table(_table(rows, self._parquet.schema if self._parquet else None))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"rows of differing columns or types cannot share a Parquet file ({error}); write "
                ".jsonl"
            ) from error

    def _write_table(self, table: pa.Table) -> None:
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._file, table.schema)
        self._parquet.write_table(table)

    def close(self) -> None:
        """Ends the file; a Parquet file without a row has no columns."""
        if self._is_parquet and self._parquet is None:
            self._parquet = pq.ParquetWriter(self._file, pa.schema([]))
        if self._parquet is not None:
            self._parquet.close()


def _table(rows: list[Row], schema: pa.Schema | None) -> pa.Table:
    """Rows with every column and field that one of them has; Arrow itself drops strangers."""
    names = dict.fromkeys(name for row in rows for name in row)
    inferred = pa.table({name: [row.get(name) for row in rows] for name in names})
    if schema is None:
        return inferred
    both = pa.unify_schemas([schema, inferred.schema], promote_options="permissive")
    if not both.equals(schema):
        raise pa.ArrowTypeError(f"columns {inferred.schema.names} after {schema.names}")
    return pa.Table.from_pylist(rows, schema=schema)


def _ended(line: bytes) -> bytes:
    return line if line.endswith(b"\n") else line + b"\n"


@contextmanager
def row_file(path: str | os.PathLike[str]) -> Iterator[RowFile]:
    """A `RowFile` for a .jsonl or .parquet path, whole or not at all (see `whole_file`).

    Raises:
        DataError: another kind of file, or it cannot be written.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".jsonl", ".parquet"):
        raise DataError(f"the output {path} is of an unknown kind, expected .jsonl or .parquet")
    with whole_file(path) as file:
        rows = RowFile(file, kind == ".parquet")
        try:
            yield rows
        finally:  # after an error too, while the file is open: a Parquet writer ends itself later
            rows.close()


def same_file(one: Any, other: Any) -> bool:
    """Whether both are paths of one existing file."""
    paths = [Path(p).expanduser() for p in (one, other) if isinstance(p, str | Path)]
    return len(paths) == 2 and all(p.exists() for p in paths) and paths[0].samefile(paths[1])
