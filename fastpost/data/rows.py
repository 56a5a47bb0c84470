"""Rows of JSONL, Parquet and `datasets`, a batch at a time, with errors that name the line.

A batch keeps its rows as the file had them (bytes of a line, an Arrow table): it is cheap to hand
to another process, which parses it, and rows that nobody changes are written back as they were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["Batch", "DataError", "Row", "load_table", "read_batches", "read_rows"]

Row = dict[str, Any]

BATCH_ROWS = 512
READ_BY_DATASETS = {".json": "json", ".csv": "csv"}
KINDS = (".jsonl", ".parquet", *READ_BY_DATASETS)
_SHOWN = 80


class DataError(ValueError):
    """Data that cannot be read, used or written: says where, what was expected, how to fix it."""


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one source.

    Attributes:
        source: file or name, for messages.
        first: number of the first row, from 0; blank lines are no rows.
        table: the rows of an Arrow source, else None.
        lines: (line number from 1, bytes) of a JSONL source.
        objects: rows that were in memory already.
    """

    source: str
    first: int
    table: pa.Table | None = None
    lines: list[tuple[int, bytes]] = field(default_factory=list)
    objects: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lines) + len(self.objects) if self.table is None else self.table.num_rows

    def __getstate__(self) -> dict[str, Any]:
        """For another process: a slice of an Arrow table would be copied with all of its table."""
        state = dict(self.__dict__)
        if self.table is not None:
            stream = pa.BufferOutputStream()
            with pa.ipc.new_stream(stream, self.table.schema) as writer:
                writer.write_table(self.table)
            state["table"] = stream.getvalue().to_pybytes()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["table"] is not None:
            state["table"] = pa.ipc.open_stream(state["table"]).read_all()
        self.__dict__.update(state)

    def rows(self) -> list[Row]:
        """The rows parsed.

        Raises:
            DataError: a line is not a JSON object.
        """
        if self.table is not None:
            return self.table.to_pylist()
        if self.objects:
            return self.objects
        return [parse_line(self.source, number, line) for number, line in self.lines]


def parse_line(source: str, number: int, line: bytes) -> Row:
    """One row of a JSONL file.

    Raises:
        DataError: the line is not a JSON object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        shown = line[:_SHOWN].decode("utf-8", "replace").strip()
        raise DataError(
            f"{source}, line {number} is not JSON ({error}): {shown!r}; correct or delete the line"
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f"{source}, line {number} holds a JSON {type(row).__name__}, expected an object such "
            'as {"text": "..."}; a JSON array of rows is a .json file'
        )
    return row


def read_rows(source: Any, split: str = "train") -> Iterator[Row]:
    """As `read_batches`, row by row."""
    for batch in read_batches(source, split):
        yield from batch.rows()


def read_batches(source: Any, split: str = "train", size: int = BATCH_ROWS) -> Iterator[Batch]:
    """Streams a source in batches of at most `size` rows; memory does not grow with the file.

    Args:
        source: a .jsonl, .parquet, .json or .csv file, a folder or hub name for `datasets`, a
            `datasets` data set, or a sequence of dictionaries.
        split: of a folder, a name or a dictionary of data sets; a file is one split.

    Raises:
        DataError: there is no such data, it is malformed, or it has no row.
    """
    batches = _batches(source, split, size)
    try:
        first = next(batches, None)
        if first is None:
            raise DataError(f"{name_of(source)} has no rows")
        yield first
        yield from batches
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{name_of(source)} cannot be read: {error}") from error


def name_of(source: Any) -> str:
    """What messages call a source."""
    return str(source) if isinstance(source, str | Path) else f"a {type(source).__name__}"


def _batches(source: Any, split: str, size: int) -> Iterator[Batch]:
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        require_file(path)
        if path.suffix.lower() == ".jsonl":
            return _of_lines(path, size)
        if path.suffix.lower() == ".parquet":
            return _of_parquet(path, size)
    elif isinstance(source, Sequence):
        return _of_objects(name_of(source), source, size)
    return _of_table(name_of(source), load_table(source, split), size)


def require_file(path: Path) -> None:
    """Refuse a file name that cannot be a data file; folders and hub names pass.

    Raises:
        DataError: no such file, an unknown kind, or nothing in it.
    """
    kind = path.suffix.lower()
    if kind in KINDS and not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.is_file() and kind not in KINDS:
        raise DataError(f"{path} is of an unknown kind, expected {', '.join(KINDS)}")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path} is empty")


def _of_lines(path: Path, size: int) -> Iterator[Batch]:
    first = 0
    with path.open("rb") as file:
        filled = ((n, line) for n, line in enumerate(file, start=1) if not line.isspace())
        while lines := list(islice(filled, size)):
            yield Batch(str(path), first, lines=lines)
            first += len(lines)


def _of_parquet(path: Path, size: int) -> Iterator[Batch]:
    with pq.ParquetFile(path) as file:
        tables = (pa.Table.from_batches([batch]) for batch in file.iter_batches(size))
        yield from _numbered(str(path), tables)


def _of_table(name: str, table: Any, size: int) -> Iterator[Batch]:
    """Of a `datasets.Dataset`; its files are mapped, not loaded."""
    yield from _numbered(name, table.with_format("arrow").iter(size))


def _numbered(name: str, tables: Iterable[pa.Table]) -> Iterator[Batch]:
    first = 0
    for table in tables:
        if table.num_rows:
            yield Batch(name, first, table=table)
            first += table.num_rows


def _of_objects(name: str, rows: Sequence[Any], size: int) -> Iterator[Batch]:
    for first in range(0, len(rows), size):
        part = list(rows[first : first + size])
        for row in part:
            if not isinstance(row, dict):
                raise DataError(f"{name} holds a {type(row).__name__}, expected dictionaries")
        yield Batch(name, first, objects=part)


def load_table(source: Any, split: str = "train") -> Any:
    """A source as a `datasets.Dataset`, mapped from disk.

    Args:
        source: as for `read_batches`, but a list of rows.
        split: in the notation of `datasets` ("train", "test[:10%]"); a file and a saved single data
            set have no splits of their own: any name stands for the whole.

    Raises:
        DataError: it cannot be loaded, or has no such split.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk  # heavy
    from datasets.exceptions import DatasetsError

    try:
        if isinstance(source, str | Path):
            path = Path(source).expanduser()
            require_file(path)
            builder = {**READ_BY_DATASETS, ".parquet": "parquet", ".jsonl": "json"}.get(
                path.suffix.lower()
            )
            if builder:
                return load_dataset(builder, data_files={_name(split): str(path)}, split=split)
            is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
            if not is_saved:
                return load_dataset(str(path) if path.is_dir() else str(source), split=split)
            source = load_from_disk(str(path))
        if isinstance(source, DatasetDict):
            return _part(source, split)
        if isinstance(source, Dataset):
            return source if split == _name(split) else _part({_name(split): source}, split)
    except (DatasetsError, OSError, ValueError, AssertionError) as error:
        if isinstance(error, DataError):
            raise
        cause = error.__cause__ or error
        raise DataError(f"{name_of(source)} ({split}) cannot be loaded: {cause}") from error
    raise DataError(
        f"expected a file, a name, a datasets.Dataset or a list of rows, got {name_of(source)}"
    )


def _name(split: str) -> str:
    """The name in a split's notation, such as "train" in "train[:10%]"."""
    return re.split(r"[^\w.-]", split, maxsplit=1)[0]


def _part(tables: Mapping[str, Any], split: str) -> Any:
    """What `split` names among data sets that are loaded already.

    Raises:
        DataError: there is no such split.
    """
    from datasets import ReadInstruction, concatenate_datasets  # heavy

    if split in tables:
        return tables[split]
    lengths = {name: len(table) for name, table in tables.items()}
    try:
        ranges = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (KeyError, ValueError) as error:
        raise DataError(f"there is no split {split!r}, the data set has {list(tables)}") from error
    parts = [
        tables[r.splitname].select(
            range(r.from_ or 0, lengths[r.splitname] if r.to is None else r.to)
        )
        for r in ranges
    ]
    return concatenate_datasets(parts)
