"""`python -m bench.data [--rows N] [--processes P]`: rows/s of decontamination and mixing.

Rows of 500 words drawn from a Zipf law over 50,000 words, so that most words of a training row are
words of the evaluation sets, as in natural text; one row in a thousand holds a question of a set.
Ten evaluation sets of 1,000 rows. The whole command is timed: reading JSONL, parsing, searching,
writing what stays. The line for a million rows is a projection, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.environment import describe
from fastpost.data.decontaminate import decontaminate, index_evaluation_sets
from fastpost.data.mix_recipe import MixRecipe, MixSource
from fastpost.data.mix_report import MixReporter
from fastpost.data.mixture import Mixture
from fastpost.data.units import WordUnits

__all__: list[str] = []

VOCABULARY, WORDS, SETS, SET_ROWS, SET_WORDS = 50_000, 500, 10, 1_000, 100
PLANTED_EVERY = 1_000
MIXED_ROWS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train, sets = write_data(Path(folder), args.rows)
        began = time.perf_counter()
        index = index_evaluation_sets({str(path): path for path in sets}, WordUnits())
        indexed = time.perf_counter() - began
        began = time.perf_counter()
        summary = decontaminate(
            train, index, output=Path(folder) / "clean.jsonl", processes=args.processes
        )
        seconds = time.perf_counter() - began
        mixed = min(args.rows, MIXED_ROWS)
        speeds = {near: mixed / mix(train, mixed, near) for near in (False, True)}
    expected = -(-args.rows // PLANTED_EVERY)
    if summary.contaminated != expected:
        raise SystemExit(f"planted {expected} rows, found {summary.contaminated}: no timing")
    memory = [
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    print("machine:", *describe("bench.data")["machine"].values())
    print(
        f"measured: {args.rows:,} rows of {WORDS} words against {SETS} sets of {SET_ROWS:,} rows "
        f"({len(index):,} 13-grams), {args.processes} processes\n"
        f"  index {indexed:.1f} s; {seconds:.1f} s, {args.rows / seconds:,.0f} rows/s; "
        f"{summary.contaminated} of {expected} planted rows found\n"
        f"  peak memory {memory[0]:.0f} MB here, {memory[1]:.0f} MB in the largest process"
    )
    print(
        f"measured: mixing {mixed:,} of these rows in one process, report included: "
        f"{speeds[False]:,.0f} rows/s, with near-duplicates {speeds[True]:,.0f}"
    )
    million = indexed + 1e6 * seconds / args.rows
    print(f"projected, not measured: 1,000,000 such rows in {million / 60:.1f} minutes")


def mix(train: Path, rows: int, near_duplicates: bool) -> float:
    """Seconds to plan, stream and describe a mixture of the training file with itself."""
    began = time.perf_counter()
    sources = {name: MixSource(str(train), weight=weight) for name, weight in (("a", 1), ("b", 2))}
    reporter = MixReporter(Mixture(MixRecipe(sources, rows=rows)), near_duplicates)
    for _ in reporter.watch():
        pass
    reporter.report()
    return time.perf_counter() - began


def write_data(folder: Path, rows: int) -> tuple[Path, list[Path]]:
    """The training file and the evaluation files."""
    rng = np.random.default_rng(0)
    lengths = 2 + rng.poisson(3, VOCABULARY)
    letters = np.array(list("etaoinshrdlu"))
    vocabulary = np.array(["".join(rng.choice(letters, k)) for k in lengths])
    share = 1 / np.arange(10, VOCABULARY + 10)
    share /= share.sum()

    def texts(count: int, length: int) -> list[str]:
        drawn = vocabulary[rng.choice(VOCABULARY, (count, length), p=share)]
        return [" ".join(row) + "." for row in drawn]

    sets, questions = [], []
    for number in range(SETS):
        found = texts(SET_ROWS, SET_WORDS)
        questions.append(found[0])
        sets.append(folder / f"set{number}.jsonl")
        write_lines(sets[-1], found)
    train = folder / "train.jsonl"
    with train.open("w") as file:
        for first in range(0, rows, PLANTED_EVERY):
            found = texts(min(PLANTED_EVERY, rows - first), WORDS)
            found[0] += " " + questions[first // PLANTED_EVERY % SETS]
            file.writelines(json.dumps({"text": text}) + "\n" for text in found)
    return train, sets


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
