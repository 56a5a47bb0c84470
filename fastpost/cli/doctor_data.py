"""`fastpost doctor data`: whether a file means to a model what it was meant to."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastpost.cli.plain_parser import PlainParser
from fastpost.cli.recipe import UsageError
from fastpost.cli.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from fastpost.doctor.data_finding import DataFinding

EPILOG = """Checks roles, empty turns, special tokens (BOS, EOS, padding), the share of tokens that
is learnt, that training renders a row as inference does, and that SFT, DPO and RL see the same
tokens. Each finding names a row, shows the place and says what to do. Exit code 1 on an error."""


def main(argv: list[str]) -> int:
    """Runs the command; `argv`: what follows `doctor data`. Returns its exit code."""
    args = _parser().read(argv)
    if args is None:
        return 0
    if args.rows < 1:
        raise UsageError(f"--rows {args.rows}: expected at least 1")
    if args.max_length is not None and args.max_length < 2:
        raise UsageError(f"--max-length {args.max_length}: expected at least 2")
    from fastpost.data.rows import read_rows
    from fastpost.doctor.data_report import check_data

    tokenizer = load_tokenizer(args.model, "--model")
    try:
        rows = read_rows(args.file, args.split)
        report = check_data(rows, tokenizer, max_length=args.max_length, max_rows=args.rows)
    except ValueError as error:  # DataError among them
        raise UsageError(f"{args.file}: {error}") from error
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        share = report.scored / max(1, report.tokens)
        print(
            f"{report.rows:,} rows, {report.tokens:,} tokens, {share:.1%} scored, "
            f"{report.truncated:,} truncated"
        )
        for finding in report.findings:
            print(_shown(finding))
        if not report.findings:
            print("nothing found")
    return int(any(finding.level == "error" for finding in report.findings))


def _shown(finding: DataFinding) -> str:
    where = "" if finding.row is None else f" (row {finding.row}, {finding.rows:,} in all)"
    text = f"{finding.level:8} {finding.check}: {finding.what}{where}. Fix: {finding.fix}"
    lines = [textwrap.fill(text, 100, subsequent_indent=" " * 9)]
    lines += [f"{' ' * 9}| {line}" for line in finding.text.splitlines()]
    return "\n".join(lines)


def _parser() -> PlainParser:
    parser = PlainParser(
        "doctor data",
        "Says whether training data means to a model what it was meant to.",
        EPILOG,
    )
    add = parser.add_argument
    add("file", metavar="FILE", help=".jsonl, .parquet, .json, .csv, a folder or a hub name")
    add("--model", required=True, help="folder or name of the model to be trained")
    add("--rows", type=int, default=1000, help="rows looked at, from the first (1000)")
    add("--max-length", type=int, help="tokens that rows will be cut to")
    add("--split", default="train", help="split, where there are several (train)")
    add("--json", action="store_true", help="prints JSON")
    return parser
