"""What a mixture is made of, checked before any data is read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fastpost.data.normalisers import NORMALISERS
from fastpost.data.rows import DataError

__all__ = ["MixRecipe", "MixSource", "read_mix_recipe"]


@dataclass(frozen=True)
class MixSource:
    """A named source.

    Attributes:
        data: file, folder, hub name, or a `datasets` data set.
        weight: its share among the sources without a count; None for its number of rows.
        count: exactly so many rows instead; more than it has repeats it.
        split: of a folder or a name.

    Raises:
        DataError: weight and count together, or either out of range.
    """

    data: Any
    weight: float | None = None
    count: int | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if self.weight is not None and self.count is not None:
            raise DataError("a source has a weight or a count, not both")
        if self.weight is not None and not (_is_number(self.weight) and 0 < self.weight < math.inf):
            raise DataError(f"weight: {self.weight!r}, expected a number above 0")
        if self.count is not None and not (_is_whole(self.count) and self.count > 0):
            raise DataError(f"count: {self.count!r}, expected a whole number above 0")


@dataclass(frozen=True)
class MixRecipe:
    """A mixture.

    Attributes:
        sources: by name.
        rows: rows of the mixture; None for the counts' sum, plus the rows of all other sources.
        temperature: shares are weight^(1/temperature), so 1 keeps them and more evens them out
            (XLM-R, arXiv 1911.02116, section 3.1, with alpha = 1/temperature).
        seed: of the order, and of which rows are drawn where a source is not drawn whole.
        max_length: units; longer rows are counted as truncated in the report.
        model: folder or name of a tokenizer: lengths are its tokens; None: words.
        length_edges: where length buckets begin, ascending, 0 apart: [512, 2048] makes three.
        long_share: at least this share of the mixture's rows comes from the last bucket.
        normalise: names of `fastpost.data.normalisers`, applied to the assistant's texts in order.

    Raises:
        DataError: a value out of range.
    """

    sources: dict[str, MixSource]
    rows: int | None = None
    temperature: float = 1.0
    seed: int = 0
    max_length: int | None = None
    model: str | None = None
    length_edges: list[int] = field(default_factory=list)
    long_share: float = 0.0
    normalise: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("sources: none given; name at least one")
        for name, least in (("rows", 1), ("seed", 0), ("max_length", 1)):
            value = getattr(self, name)
            if not (_is_whole(value) and value >= least) and not (value is None and least):
                raise DataError(f"{name}: {value!r}, expected a whole number of at least {least}")
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise DataError(f"temperature: {self.temperature!r}, expected a number above 0")
        edges = self.length_edges
        if not isinstance(edges, list) or not all(_is_whole(e) and e > 0 for e in edges):
            raise DataError(f"length_edges: {edges!r}, expected a list of lengths above 0")
        if sorted(set(edges)) != edges:
            raise DataError(f"length_edges: {edges}, expected lengths that ascend")
        if not (_is_number(self.long_share) and 0 <= self.long_share <= 1):
            raise DataError(f"long_share: {self.long_share!r}, expected a share from 0 to 1")
        if self.long_share and not edges:
            raise DataError("long_share needs length_edges, which say what is long")
        if not isinstance(self.normalise, list):
            raise DataError(f"normalise: {self.normalise!r}, expected a list of names")
        for name in self.normalise:
            _require_known(name, NORMALISERS, "normalise")


def read_mix_recipe(path: str | Path) -> MixRecipe:
    """A recipe from YAML; files named in it are relative to the recipe's folder.

    Raises:
        DataError: the file is missing or no mapping, a field is unknown or out of range.
    """
    path = Path(path).expanduser()
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise DataError(f"the recipe {path} is not YAML: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("sources"), dict):
        raise DataError(f"{path}: expected a mapping with `sources: {{NAME: {{data: FILE}}}}`")
    for name in found:
        _require_known(name, [f.name for f in fields(MixRecipe)], str(path))
    sources = {}
    for name, given in found["sources"].items():
        where = f"{path}: sources.{name}"
        if isinstance(given, str):
            given = {"data": given}
        if not isinstance(given, dict) or not isinstance(given.get("data"), str):
            raise DataError(f"{where}: expected a file, or a mapping with `data: FILE`")
        for key in given:
            _require_known(key, [f.name for f in fields(MixSource)], where)
        beside = path.parent / Path(given["data"]).expanduser()
        data = str(beside) if beside.exists() or beside.suffix == ".jsonl" else given["data"]
        try:
            sources[str(name)] = MixSource(**{**given, "data": data})
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    try:
        return MixRecipe(**{**found, "sources": sources})
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _require_known(name: Any, known: Iterable[str], where: str) -> None:
    names = list(known)
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected {', '.join(names)}"
        raise DataError(f"{where}: unknown {name!r}; {hint}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
