"""`fastpost report`: what a run did, or several beside each other."""

from __future__ import annotations

from pathlib import Path

from fastpost.cli.plain_parser import PlainParser
from fastpost.cli.recipe import UsageError

EPILOG = """RUN is the folder of a `fastpost run`, or the output_dir of a training with
`record: true`.
--html writes one page that needs no network: curves of every stage (several runs overlaid), health
findings, evaluations, answers side by side, memory, time and cost."""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = PlainParser("report", "Shows what a run did, or several beside each other.", EPILOG)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run")
    parser.add_argument(
        "--html", metavar="FILE", nargs="?", const="", help="writes a page (RUN/report.html)"
    )
    args = parser.read(argv)
    if args is None:
        return 0
    from fastpost.report.reading import NoRun, read_run
    from fastpost.report.text import text_of

    try:
        runs = [read_run(folder) for folder in args.runs]
    except NoRun as error:
        raise UsageError(str(error)) from error
    if args.html is None:
        print(text_of(runs))
        return 0
    from fastpost.report.page import page_of

    path = Path(args.html or Path(args.runs[0]).expanduser() / "report.html")
    try:
        path.write_text(page_of(runs), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {path}: {error.strerror}") from None
    print(path)
    return 0
