"""Every loader takes every source, its splits and their slices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from fastpost.cli.dataset import load_data
from fastpost.cli.recipe import UsageError
from fastpost.data.rows import DataError, load_table, read_rows

ROWS = [{"text": f"row {i}"} for i in range(10)]


def sources(folder: Path) -> dict[str, str]:
    """The same rows in every form on disk."""
    table = Dataset.from_list(ROWS)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "a.json").write_text(json.dumps(ROWS))
    table.to_parquet(str(folder / "a.parquet"))
    table.to_csv(str(folder / "a.csv"))
    table.save_to_disk(str(folder / "saved"))
    DatasetDict(train=table, test=table.select([3])).save_to_disk(str(folder / "splits"))
    (folder / "files").mkdir()
    table.to_parquet(str(folder / "files" / "train-0.parquet"))
    names = ["a.jsonl", "a.json", "a.parquet", "a.csv", "saved", "splits", "files"]
    return {name: str(folder / name) for name in names}


def test_every_source_and_slice(tmp_path: Path) -> None:
    for name, source in sources(tmp_path).items():
        assert list(read_rows(source)) == ROWS, name
        assert list(load_table(source, "train[2:4]")) == ROWS[2:4], name
        assert list(load_table(source, "train[-20%:]")) == ROWS[-2:], name
        assert list(load_data(source, "train[:3]", "dataset")) == ROWS[:3], name


def test_splits_by_name(tmp_path: Path) -> None:
    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[3:4]))
    assert list(load_table(splits, "test")) == ROWS[3:4]
    assert list(load_table(splits, "test+train[:1]")) == [ROWS[3], ROWS[0]]
    for wrong in ("dev", "dev[:3]", "train[:x]"):
        with pytest.raises(DataError, match=r"there is no split.*\['train', 'test'\]"):
            load_table(splits, wrong)
    with pytest.raises(DataError, match="got a int"):
        load_table(5)


def test_mistakes_name_their_field(tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("text\n")
    for source, complaint in [
        ("absent.parquet", "there is no file"),
        (str(tmp_path / "absent_folder"), "cannot be loaded"),
        (str(tmp_path / "none.csv"), "has no rows|cannot be loaded"),
    ]:
        with pytest.raises(UsageError, match=f"^eval_dataset: .*({complaint})"):
            load_data(source, "train", "eval_dataset")
