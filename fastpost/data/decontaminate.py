"""Training rows that share an n-gram with an evaluation set, found exactly and in one pass.

A row is contaminated if one of its texts shares n consecutive words (or tokens) with a text of an
evaluation set (GPT-3, arXiv 2005.14165, appendix C: n = 13 words, case and punctuation apart).
Windows never span two texts, so a turn is not joined with the next.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastpost.data.ngram_index import NgramIndex
from fastpost.data.passages import Place, passages, place_name, replace_passage, require_columns_of
from fastpost.data.row_files import json_line, row_file, same_file, whole_file
from fastpost.data.rows import Batch, DataError, Row, read_batches, read_rows
from fastpost.data.units import Units

__all__ = [
    "ACTIONS",
    "Contaminated",
    "Match",
    "Summary",
    "decontaminate",
    "find_contamination",
    "index_evaluation_sets",
]

Action = Literal["drop", "mask", "stop"]
ACTIONS = ("drop", "mask", "stop")
MASK = "[removed]"
# Evaluation texts that a match names; how many there are is always counted in full.
_NAMED = 5


@dataclass(frozen=True)
class Match:
    """A stretch of a training row that stands in evaluation sets.

    Attributes:
        row: number of the training row, from 0.
        place: of the text in the row, such as `messages[1].content`.
        start, end: characters [start, end) of the stretch in that text.
        text: the stretch as the training row has it.
        evaluation_text: its first n-gram as the first of `found_in` has it.
        found_in: up to five of the evaluation texts, as {"set", "row", "place"}.
        places: how many evaluation texts hold an n-gram of the stretch.
    """

    row: int
    place: str
    start: int
    end: int
    text: str
    evaluation_text: str
    found_in: list[dict[str, Any]]
    places: int


@dataclass
class Summary:
    """Counts of a pass: of training rows, and by evaluation set.

    `matched_by_set`: training rows that match the set. `evaluation_rows`: rows of the set.
    `evaluation_rows_found`: of these, how many stand in the training data. `short_rows`: of these,
    how many have no text of n units and can match nothing.
    """

    rows: int = 0
    contaminated: int = 0
    matches: int = 0
    matched_by_set: dict[str, int] = field(default_factory=dict)
    evaluation_rows: dict[str, int] = field(default_factory=dict)
    evaluation_rows_found: dict[str, int] = field(default_factory=dict)
    short_rows: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        share = self.contaminated / max(1, self.rows)
        lines = [
            f"{self.rows:,} rows, {self.contaminated:,} contaminated ({share:.2%}), "
            f"{self.matches:,} stretches"
        ]
        for name, count in self.evaluation_rows.items():
            short = self.short_rows[name]
            lines.append(
                f"  {name}: {self.matched_by_set[name]:,} training rows; "
                f"{self.evaluation_rows_found[name]:,} of its {count:,} rows found"
                + (f"; {short:,} are too short to match anything" if short else "")
            )
        return "\n".join(lines)


class Contaminated(DataError):
    """Rows match and the action is "stop"; `summary` says how many."""

    def __init__(self, message: str, summary: Summary) -> None:
        super().__init__(message)
        self.summary = summary


@dataclass(frozen=True)
class _Found:
    """What a batch gave; the keys of `masks` and `sets` are places in the batch."""

    rows: int
    matches: list[Match]
    masks: dict[int, dict[Place, list[tuple[int, int]]]]
    sets: dict[int, set[str]]
    new_texts: list[int]


def index_evaluation_sets(
    sets: dict[str, Any],
    units: Units,
    n: int = 13,
    split: str = "test",
    columns: list[str] | None = None,
) -> NgramIndex:
    """An index of named evaluation sets, each whatever `read_batches` takes.

    Raises:
        DataError: a set cannot be read, has no row or no text, or none has n units in a text.
    """
    index = NgramIndex(units, n)
    for name, source in sets.items():
        index.add(name, read_rows(source, split), columns)
    index.build()
    if len(index) == 0:
        raise DataError(
            f"no text of the evaluation sets {', '.join(sets)} has {n} {units.name}, so nothing "
            "could match; choose a smaller n"
        )
    return index


def find_contamination(
    source: Any,
    index: NgramIndex,
    *,
    split: str = "train",
    columns: list[str] | None = None,
    processes: int = 1,
) -> Iterator[tuple[Batch, _Found]]:
    """Batches of a source in order, each with what was found in it.

    Args:
        source: training rows, see `read_batches`.
        index: see `index_evaluation_sets`.
        columns: top-level columns that are searched; None for all texts.
        processes: parsing and searching processes beside this one, which reads; 1: this one alone.
    """
    batches = read_batches(source, split)
    with _mapping(index, columns, processes) as mapping:
        yield from mapping(batches)


def decontaminate(
    source: Any,
    index: NgramIndex,
    *,
    action: Action = "drop",
    output: str | Path | None = None,
    report: str | Path | None = None,
    split: str = "train",
    columns: list[str] | None = None,
    processes: int = 1,
) -> Summary:
    """Writes the training rows without what the evaluation sets hold, and a report of matches.

    Args:
        source: training rows, see `read_batches`; read once, in batches.
        action: "drop" leaves contaminated rows out; "mask" writes `[removed]` in place of each
            stretch; "stop" writes the report only and raises if anything matched.
        output: .jsonl or .parquet; None to report only.
        report: .jsonl file of one `Match` a line; None for none.
        split, columns, processes: as in `find_contamination`.

    Returns:
        The counts.

    Raises:
        Contaminated: the action is "stop" and rows match; the report is written before.
        DataError: data that cannot be read or written; no file is left behind then.
    """
    if action not in ACTIONS:
        raise ValueError(f"action={action!r}; expected {', '.join(ACTIONS)}")
    for written in (output, report):
        if written is not None and same_file(source, written):
            raise DataError(f"{written} is the training data itself; choose another file")
    if action == "stop" and output is not None:
        raise ValueError('action="stop" writes no rows; leave output out, or drop or mask')
    summary = Summary(
        matched_by_set=dict.fromkeys(index.rows_of, 0),
        evaluation_rows=dict(index.rows_of),
        short_rows=dict(index.short_rows_of),
    )
    seen: set[int] = set()
    with ExitStack() as stack:
        lines = stack.enter_context(whole_file(report)) if report is not None else None
        kept = stack.enter_context(row_file(output)) if output is not None else None
        for batch, found in find_contamination(
            source, index, split=split, columns=columns, processes=processes
        ):
            _count(summary, found)
            seen.update(found.new_texts)
            if lines is not None:
                lines.writelines(json_line(asdict(match)) for match in found.matches)
            if kept is not None:
                kept.write_batch(batch, *_left(batch, found, action))
    rows_seen = {(index.origins[text].name, index.origins[text].row) for text in seen}
    for name in index.rows_of:
        summary.evaluation_rows_found[name] = sum(found == name for found, _ in rows_seen)
    if action == "stop" and summary.contaminated:
        where = f"; see {report}" if report is not None else ""
        raise Contaminated(f"the training data is contaminated{where}\n{summary}", summary)
    return summary


def _count(summary: Summary, found: _Found) -> None:
    summary.rows += found.rows
    summary.contaminated += len(found.masks)
    summary.matches += len(found.matches)
    for names in found.sets.values():
        for name in names:
            summary.matched_by_set[name] += 1


def _left(batch: Batch, found: _Found, action: Action) -> tuple[list[int], dict[int, Row]]:
    """Places in the batch of the rows that stay, and those of them that are changed."""
    if action == "drop":
        return [i for i in range(len(batch)) if i not in found.masks], {}
    changed = {}
    if found.masks:
        rows = batch.rows()
        for i, by_place in found.masks.items():
            changed[i] = _masked(rows[i], by_place)
    return list(range(len(batch))), changed


def _masked(row: Row, by_place: dict[Place, list[tuple[int, int]]]) -> Row:
    texts = dict(passages(row))
    for place, spans in by_place.items():
        text = texts[place]
        for start, end in reversed(_united(spans)):
            text = text[:start] + MASK + text[end:]
        row = replace_passage(row, place, text)
    return row


def _united(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans with those joined that share a character: windows further on may overlap."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


class _Search:
    """Searches one batch; a copy of it lives in every process."""

    def __init__(self, index: NgramIndex, columns: list[str] | None) -> None:
        self._index, self._columns = index, columns

    def __call__(self, batch: Batch) -> _Found:
        rows = batch.rows()
        if batch.first == 0:
            require_columns_of(rows[0], self._columns, batch.source)
        found = [
            (i, *passage) for i, row in enumerate(rows) for passage in passages(row, self._columns)
        ]
        hits = self._index.search([text for _, _, text in found])
        result = _Found(len(rows), [], {}, {}, [])
        for hit in hits:
            i, place, text = found[hit.text]
            spans = self._index.units.spans(text)
            start, end = spans[hit.first][0], spans[hit.last][1]
            result.masks.setdefault(i, {}).setdefault(place, []).append((start, end))
            origins = [self._index.origins[k] for k in hit.found_in.tolist()]
            result.sets.setdefault(i, set()).update(origin.name for origin in origins)
            result.new_texts.extend(hit.new.tolist())
            held, evaluation_text = self._index.window_text(hit.window)
            named = [self._index.origins[held], *origins]
            unique = list(dict.fromkeys(named))[:_NAMED]
            result.matches.append(
                Match(
                    batch.first + i,
                    place_name(place),
                    start,
                    end,
                    text[start:end],
                    evaluation_text,
                    [{"set": o.name, "row": o.row, "place": place_name(o.place)} for o in unique],
                    len(origins),
                )
            )
        return result


_search: _Search | None = None


def _adopt(search: _Search) -> None:
    global _search
    _search = search


def _search_one(batch: Batch) -> _Found:
    assert _search is not None
    return _search(batch)


@contextmanager
def _mapping(
    index: NgramIndex, columns: list[str] | None, processes: int
) -> Iterator[Callable[[Iterator[Batch]], Iterator[tuple[Batch, _Found]]]]:
    """A function from batches to batches and findings, in order, with bounded look-ahead."""
    search = _Search(index, columns)
    # Forked processes share the index; elsewhere it would be copied to each.
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    if processes == 1 or not can_fork:
        yield lambda batches: ((batch, search(batch)) for batch in batches)
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, _adopt, (search,)) as pool:

        def mapped(batches: Iterator[Batch]) -> Iterator[tuple[Batch, _Found]]:
            waiting: list[tuple[Batch, Any]] = []
            for batch in batches:
                waiting.append((batch, pool.apply_async(_search_one, (batch,))))
                if len(waiting) > 2 * processes:
                    first, result = waiting.pop(0)
                    yield first, result.get()
            for first, result in waiting:
                yield first, result.get()

        yield mapped
