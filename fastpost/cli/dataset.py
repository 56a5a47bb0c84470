"""Loads a run's data and checks its columns before any model is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastpost.cli.recipe import UsageError
from fastpost.guards.columns import require_columns

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_data(source: str, split: str, field: str) -> Dataset:
    """Loads a JSONL, JSON, Parquet or CSV file, or a data set by its name or folder.

    Args:
        source: the file, folder or name.
        split: a split in datasets' notation ("train", "train[:1000]"); of a file, which has no
            splits of its own, any name stands for the whole.
        field: the field `source` came from, for messages.

    Raises:
        UsageError: there is no such data, it cannot be read, or it is empty.
    """
    from datasets import load_dataset  # heavy
    from datasets.exceptions import DatasetsError

    path = Path(source).expanduser()
    builder = BUILDERS.get(path.suffix.lower())
    if builder and not path.is_file():
        raise UsageError(f"{field}: there is no file {source}")
    if builder and path.stat().st_size == 0:
        raise UsageError(f"{field}: {source} is empty")
    if not builder and path.is_file():
        raise UsageError(f"{field}: {source} is of an unknown kind, expected {', '.join(BUILDERS)}")
    try:
        if builder:
            name = re.split(r"[^\w.-]", split, maxsplit=1)[0]
            data = load_dataset(builder, data_files={name: str(path)}, split=split)
        else:
            data = load_dataset(str(path) if path.is_dir() else source, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise UsageError(f"{field}: {source} ({split}) cannot be loaded: {cause}") from error
    if len(data) == 0:
        raise UsageError(f"{field}: {source} ({split}) has no rows")
    return data


def check_columns(
    data: Dataset, choices: Sequence[Sequence[str]], method: str, source: str, field: str
) -> None:
    """Refuses data that has none of the `choices`, each a set of columns needed together.

    Raises:
        UsageError: names the columns found, those needed, and likely misspellings.
    """
    try:
        require_columns(data.column_names, choices, method)
    except ValueError as error:
        raise UsageError(f"{field}: {source}: {error}") from None
