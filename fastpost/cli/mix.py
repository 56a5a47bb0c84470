"""`fastpost mix`: one file of rows from several sources, with a report of what it holds."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice

from fastpost.cli.plain_parser import PlainParser
from fastpost.cli.recipe import UsageError
from fastpost.cli.tokenizer import load_tokenizer

EPILOG = """A recipe:

  rows: 10000              # all rows where left out
  temperature: 2           # shares are weight^(1/temperature)
  length_edges: [256, 1024]
  long_share: 0.1          # at least a tenth of the rows has 1024 words or more
  normalise: [opening, bold]
  sources:
    chat: {data: chat.jsonl, weight: 3}
    maths: {data: maths.parquet, count: 500}
    web: web.jsonl         # weight: its number of rows

Also seed, max_length, model (lengths in its tokens), split of a source. The same recipe and data
make the same file."""
_WRITTEN_AT_ONCE = 256


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().read(argv)
    if args is None:
        return 0
    from fastpost.data.mix_recipe import read_mix_recipe
    from fastpost.data.mix_report import MixReporter
    from fastpost.data.mixture import Mixture
    from fastpost.data.row_files import row_file
    from fastpost.data.rows import DataError

    try:
        recipe = read_mix_recipe(args.recipe)
        tokenizer = load_tokenizer(recipe.model, "model") if recipe.model else None
        mixture = Mixture(recipe, tokenizer)
        reporter = MixReporter(mixture, not args.no_near_duplicates)
        if args.output is None:
            for _ in reporter.watch():
                pass
        else:
            with row_file(args.output) as file:
                watched = reporter.watch()
                while rows := list(islice(watched, _WRITTEN_AT_ONCE)):
                    file.write_rows(rows)
    except (DataError, ValueError) as error:
        raise UsageError(str(error)) from error
    report = reporter.report()
    print(json.dumps(dataclasses.asdict(report), indent=2) if args.json else report)
    return 0


def _parser() -> PlainParser:
    parser = PlainParser(
        "mix",
        "Makes one file of rows from several sources, and says what it holds.",
        EPILOG,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="YAML file")
    add("--output", metavar="FILE", help=".jsonl or .parquet (none: the report alone)")
    add("--no-near-duplicates", action="store_true", help="a faster report without them")
    add("--json", action="store_true", help="prints the report as JSON")
    return parser
