"""Loads a run's data and checks its columns before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastpost.cli.recipe import UsageError
from fastpost.guards.columns import require_columns

if TYPE_CHECKING:
    from datasets import Dataset


def load_data(source: str, split: str, field: str) -> Dataset:
    """Loads data as every command does (`fastpost.data.rows.load_table`).

    Args:
        source: a .jsonl, .json, .parquet or .csv file, a folder, or a name.
        split: a split in datasets' notation ("train", "train[:1000]").
        field: the field `source` came from, for messages.

    Raises:
        UsageError: there is no such data, it cannot be read, or it is empty.
    """
    from fastpost.data.rows import DataError, load_table  # heavy

    try:
        data = load_table(source, split)
    except DataError as error:
        raise UsageError(f"{field}: {error}") from error
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
