"""`fastpost decontaminate`: training rows without what the evaluation sets hold."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fastpost.cli.plain_parser import PlainParser
from fastpost.cli.recipe import UsageError
from fastpost.cli.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from fastpost.data.units import Units

EPILOG = """Each SET and TRAIN is a .jsonl, .parquet, .json or .csv file, a folder or a hub name.
Matching is exact: n consecutive words, without case and punctuation, or n consecutive tokens.
Exit code 1 if rows match under --action stop."""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().read(argv)
    if args is None:
        return 0
    if args.action != "stop" and args.output is None:
        raise UsageError(
            f"--action {args.action} writes rows: name --output FILE.jsonl or FILE.parquet, or use "
            "--action stop for the report alone"
        )
    from fastpost.data.decontaminate import Contaminated, decontaminate, index_evaluation_sets
    from fastpost.data.rows import DataError

    try:
        index = index_evaluation_sets(
            {source: source for source in args.against},
            _units(args),
            args.n,
            args.against_split,
            args.against_columns,
        )
        summary = decontaminate(
            args.train,
            index,
            action=args.action,
            output=args.output,
            report=_report_path(args),
            split=args.split,
            columns=args.columns,
            processes=args.processes,
        )
    except Contaminated as found:
        print(json.dumps(asdict(found.summary), indent=2) if args.json else found)
        return 1
    except (DataError, ValueError) as error:
        raise UsageError(str(error)) from error
    if args.json:
        print(json.dumps(asdict(summary), indent=2))
    else:
        print(summary)
        written = [str(path) for path in (args.output, _report_path(args)) if path]
        if written:
            print("written: " + ", ".join(written))
    return 0


def _parser() -> PlainParser:
    parser = PlainParser(
        "decontaminate",
        "Takes out of training rows what evaluation sets hold, and reports it.",
        EPILOG,
    )
    add = parser.add_argument
    add("train", metavar="TRAIN", help="training rows")
    add("--against", metavar="SET", action="append", required=True, help="evaluation set; repeat")
    add("--n", type=int, default=13, help="units in an n-gram (13)")
    add("--by", choices=("words", "tokens"), default="words", help="what a unit is (words)")
    add("--model", help="folder or name of the tokenizer, for --by tokens")
    add("--action", choices=("drop", "mask", "stop"), default="drop", help="(drop)")
    add("--output", metavar="FILE", help=".jsonl or .parquet for the rows that stay")
    add("--report", metavar="FILE", help=".jsonl of matches (beside the output)")
    add("--columns", nargs="+", metavar="NAME", help="columns of TRAIN searched (all texts)")
    add("--against-columns", nargs="+", metavar="NAME", help="columns of the sets (all texts)")
    add("--split", default="train", help="split of TRAIN, where it has splits (train)")
    add("--against-split", default="test", help="split of the sets, where they have any (test)")
    add(
        "--processes",
        type=int,
        help="searching processes (one a core, at most 8; 1 for tokens)",
    )
    add("--json", action="store_true", help="prints the counts as JSON")
    return parser


def _units(args: argparse.Namespace) -> Units:
    from fastpost.data.units import TokenUnits, WordUnits

    if args.processes is not None and args.processes < 1:
        raise UsageError(f"--processes {args.processes}: expected at least 1")
    if args.by == "words":
        args.processes = args.processes or min(8, os.cpu_count() or 1)
        if args.model is not None:
            raise UsageError("--model is for --by tokens; words need no tokenizer")
        return WordUnits()
    if args.model is None:
        raise UsageError("--by tokens needs --model FOLDER, the tokenizer that makes them")
    if args.processes not in (None, 1):
        raise UsageError(
            f"--processes {args.processes}: --by tokens runs in one process, since the tokenizer "
            "has threads of its own, which do not survive a fork; leave it out"
        )
    args.processes = 1
    return TokenUnits(load_tokenizer(args.model, "--model"))


def _report_path(args: argparse.Namespace) -> Path | None:
    if args.report is not None:
        return Path(args.report)
    if args.output is None:
        return None
    output = Path(args.output)
    return output.with_name(output.stem + ".contamination.jsonl")
