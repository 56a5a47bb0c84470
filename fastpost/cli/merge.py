"""`fastpost merge`: an adapter into weights, or several models into one, shard by shard."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastpost.cli.recipe import UsageError

DEFAULT_PROMPTS = (
    "The capital of France is Paris, and its largest river is the Seine.",
    "To add two fractions, bring them to a common denominator first.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help or the mistake
        return int(stop.code or 0)
    try:
        return int(options.run(options) or 0)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastpost merge", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    adapter = commands.add_parser("adapter", help="a LoRA or DoRA adapter into its base's weights")
    adapter.add_argument("base_folder")
    adapter.add_argument("adapter_folder")
    adapter.add_argument("output")
    adapter.add_argument(
        "--base",
        choices=("original", "nf4"),
        default="original",
        help="nf4: onto the dequantised 4-bit weights that the adapter was trained on",
    )
    adapter.add_argument(
        "--into",
        choices=("original", "nf4"),
        default="original",
        help="nf4: the result is written in 4 bits, as bitsandbytes writes it",
    )
    adapter.add_argument("--prompts", help="text file, one a line, to compare the results on")
    adapter.add_argument("--max-kl", type=float, default=0.01, help="nats a token; 0.01")
    adapter.set_defaults(run=_adapter)

    mean = commands.add_parser("mean", help="the mean of models (uniform soup)")
    mean.add_argument("folders", nargs="+")
    mean.add_argument("--output", required=True)
    mean.set_defaults(run=_mean)

    between = commands.add_parser("interpolate", help="a model between two others")
    between.add_argument("first")
    between.add_argument("second")
    between.add_argument("--t", type=float, required=True, help="share of the second, 0 to 1")
    between.add_argument("--spherical", action="store_true", help="along the arc between them")
    between.add_argument("--output", required=True)
    between.set_defaults(run=_interpolate)

    task = commands.add_parser("task", help="base + sum of factor (model - base)")
    task.add_argument("base")
    task.add_argument("folders", nargs="+")
    task.add_argument("--factors", type=float, nargs="+", required=True, help="one a folder")
    task.add_argument("--output", required=True)
    task.set_defaults(run=_task)
    return parser


def _adapter(options: argparse.Namespace) -> None:
    from fastpost.adapters.merge import merge_adapter  # heavy
    from fastpost.adapters.merge_nf4 import merge_adapter_nf4

    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    if options.prompts:
        lines = Path(options.prompts).read_text().splitlines()
        prompts = tuple(line for line in lines if line.strip())
    merge = merge_adapter_nf4 if options.into == "nf4" else merge_adapter
    report = merge(
        options.base_folder,
        options.adapter_folder,
        options.output,
        prompts=prompts,
        base=options.base,
        max_kl=options.max_kl,
    )
    print(f"{options.output}: {report}")


def _mean(options: argparse.Namespace) -> None:
    from fastpost.adapters.soup import uniform_soup  # heavy

    uniform_soup(options.folders, options.output)


def _interpolate(options: argparse.Namespace) -> None:
    from fastpost.adapters.soup import interpolate  # heavy

    interpolate(
        options.first, options.second, options.output, t=options.t, spherical=options.spherical
    )


def _task(options: argparse.Namespace) -> None:
    from fastpost.adapters.soup import task_arithmetic  # heavy

    task_arithmetic(options.base, options.folders, options.factors, options.output)
