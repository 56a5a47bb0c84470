"""`fastpost synthesise`: training rows made by a model, on this machine or behind an endpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpost.cli.plain_parser import PlainParser
from fastpost.cli.recipe import UsageError

if TYPE_CHECKING:
    from fastpost.chat_model.cache import CachedChatModel
    from fastpost.chat_model.usage import Estimate
    from fastpost.data.rows import Row
    from fastpost.synthesis.filters import Filters, SynthesisReport

    Made = tuple[list[Row], SynthesisReport]

METHODS = {
    "magpie": "the model writes its own users' questions, then answers them (local models)",
    "teacher": "a teacher writes questions on seed topics, then answers them",
    "reject": "several answers to each prompt, those that a reward accepts",
}
USAGE = "usage: fastpost synthesise METHOD [options]\n\nmethods:\n" + "\n".join(
    f"  {name:10}{text}" for name, text in METHODS.items()
)
EPILOG = """Every reply is kept in OUTPUT.replies (--cache) as it comes: the same command after a
crash, or with other filters, asks for nothing twice. Rows are {"messages", "provenance"}."""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n  fastpost synthesise METHOD --help  shows a method's options")
        return 0 if argv else 2
    name, *rest = argv
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    args = _parser(name).read(rest)
    if args is None:
        return 0
    from fastpost.chat_model.cache import CacheUnwritable
    from fastpost.chat_model.endpoint import EndpointRefused
    from fastpost.data.row_files import row_file
    from fastpost.data.rows import DataError

    cache = args.cache or f"{args.output}.replies"
    try:
        if Path(args.output).suffix.lower() not in (".jsonl", ".parquet"):
            raise DataError(f"the output {args.output} must be a .jsonl or .parquet file")
        inputs = _inputs(args)
        model = _model(args, cache)
        filters = _filters(args, cache)
        estimate, make, candidates = _method(args, model, inputs, filters)
        if filters.judge is not None:
            estimate = estimate + filters.judge.estimate(candidates, args.seconds_per_call)
        print(f"to be asked: {estimate}", flush=True)
        if args.estimate:
            return 0
        rows, report = make()
        with row_file(args.output) as file:
            file.write_rows(rows)
    except (DataError, CacheUnwritable, EndpointRefused, ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    print(report)
    print(
        f"{args.output}: {len(rows):,} rows; {model.asked:,} replies asked for, "
        f"{model.found:,} found in {cache}"
    )
    return 0


def _inputs(args: argparse.Namespace) -> list[Any]:
    """Topics or rows with prompts."""
    if args.method == "magpie":
        return []
    from fastpost.data.rows import DataError, read_rows

    rows = list(read_rows(args.data, args.split))
    if args.method == "reject":
        return rows
    for number, row in enumerate(rows):
        if not isinstance(row.get(args.column), str):
            raise DataError(
                f"{args.data}, row {number} has the columns {list(row)}; expected a text in "
                f"{args.column} (--column names another)"
            )
    return [row[args.column] for row in rows]


def _model(args: argparse.Namespace, cache: str) -> CachedChatModel:
    from fastpost.chat_model.cache import CachedChatModel
    from fastpost.chat_model.model_spec import ModelSpec

    names = [
        *("model", "endpoint", "api_key_env", "temperature", "top_p", "max_tokens"),
        *("concurrency", "timeout_seconds", "attempts", "prompt_price", "reply_price"),
        "batch_size",
    ]
    return CachedChatModel(ModelSpec(**{name: getattr(args, name) for name in names}).open(), cache)


def _filters(args: argparse.Namespace, cache: str) -> Filters:
    from fastpost.synthesis.filters import Filters, JudgeFilter

    judge = None
    if args.judges is not None:
        from fastpost.judges.judge_file import read_judges
        from fastpost.judges.panel import Panel

        if args.criteria is None:
            raise UsageError("--judges needs --criteria TEXT: what makes an answer good")
        panel = Panel(read_judges(args.judges, cache))
        judge = JudgeFilter(panel, args.criteria, args.min_score)
    elif args.criteria is not None:
        raise UsageError("--criteria needs --judges FILE")
    return Filters(
        min_words=args.min_words,
        max_words=args.max_words,
        languages=tuple(args.language),
        drop_refusals=not args.keep_refusals,
        near_duplicates=args.near_duplicates or None,
        judge=judge,
    )


def _method(
    args: argparse.Namespace, model: CachedChatModel, inputs: list[Any], filters: Filters
) -> tuple[Estimate, Callable[[], Made], int]:
    """What the method costs at most, the method, and how many candidates it makes."""
    settings: dict[str, Any] = {"seed": args.seed, "filters": filters}
    timed = {"seed": args.seed, "seconds_per_call": args.seconds_per_call}
    if args.method == "magpie":
        from fastpost.synthesis.magpie import estimate_magpie, magpie

        settings |= {"system": args.system, "turns": args.turns}
        estimate = estimate_magpie(model, args.count, turns=args.turns, **timed)
        return estimate, lambda: magpie(model, args.count, **settings), args.count
    settings["source"] = Path(args.data).name
    if args.method == "teacher":
        from fastpost.synthesis.teacher import estimate_teacher, teach

        settings["per_topic"] = args.per_topic
        estimate = estimate_teacher(model, inputs, per_topic=args.per_topic, **timed)
        return estimate, lambda: teach(model, inputs, **settings), len(inputs) * args.per_topic
    from fastpost.synthesis.rejection import estimate_rejection, sample_and_reject

    reward = _reward(args.reward)
    settings |= {"samples": args.samples, "keep": args.keep, "threshold": args.threshold}
    estimate = estimate_rejection(model, inputs, samples=args.samples, **timed)
    return (
        estimate,
        lambda: sample_and_reject(model, inputs, reward, **settings),
        len(inputs) * min(args.keep, args.samples),
    )


def _reward(name: str) -> Any:
    from fastpost.cli.rewards import NAMES, reward_functions

    [found] = reward_functions(name)
    if not callable(found):
        raise UsageError(
            f"reward: {name!r} is none of {', '.join(NAMES)}, FILE.py:FUNCTION or RULES.yaml"
        )
    return found


def _parser(method: str) -> PlainParser:
    what = METHODS[method]
    parser = PlainParser(f"synthesise {method}", f"{what[0].upper()}{what[1:]}.", EPILOG)
    parser.set_defaults(method=method)
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help=".jsonl or .parquet")
    if method == "magpie":
        add("--count", type=int, required=True, help="candidates; filters take from these")
        add("--system", metavar="TEXT", help="system message, which steers what is asked")
        add("--turns", type=int, default=1, help="questions in each conversation (1)")
    else:
        what = "topics" if method == "teacher" else "prompts, with what the reward needs"
        add("--data", required=True, help=f"{what}: .jsonl, .parquet, .json, .csv, folder or name")
        add("--split", default="train", help="of a folder or a name (train)")
    if method == "teacher":
        add("--column", default="topic", help="the topics' column (topic)")
        add("--per-topic", type=int, required=True, metavar="N", help="questions on each topic")
    if method == "reject":
        add("--reward", required=True, help="maths, tags, code, FILE.py:FUNCTION or RULES.yaml")
        add("--threshold", type=float, required=True, help="least reward of an answer that stays")
        add("--samples", type=int, default=8, help="answers to each prompt (8)")
        add("--keep", type=int, default=1, help="best answers that stay of each prompt (1)")
    _add_model(parser, method)
    _add_filters(parser)
    return parser


def _add_model(parser: PlainParser, method: str) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help="folder or hub name; the endpoint's name for it")
    remote = argparse.SUPPRESS if method == "magpie" else None
    add("--endpoint", metavar="URL", help=remote or "OpenAI-compatible, .../v1/chat/completions")
    add("--api-key-env", metavar="NAME", help=remote or "environment variable with the key")
    add("--concurrency", type=int, help=remote or "requests at once (8)")
    add("--timeout-seconds", type=float, help=remote or "for one request (120)")
    add("--attempts", type=int, help=remote or "requests before one is given up (4)")
    add("--prompt-price", type=float, help=remote or "of a million prompt tokens")
    add("--reply-price", type=float, help=remote or "of a million reply tokens")
    add("--batch-size", type=int, help="conversations at once, of a local model (16)")
    add("--temperature", type=float, default=1.0, help="of the samples (1)")
    add("--top-p", type=float, default=1.0, help="share of probability sampled from (1)")
    add("--max-tokens", type=int, default=1024, help="longest reply; cut ones are dropped (1024)")
    add("--seed", type=int, default=0, help="decides every sample (0)")
    add("--cache", metavar="FOLDER", help="of the replies (OUTPUT.replies)")
    add("--estimate", action="store_true", help="prints calls, tokens, cost and time, and ends")
    add("--seconds-per-call", type=float, metavar="S", help="for the estimate of time")


def _add_filters(parser: PlainParser) -> None:
    add = parser.add_argument_group("filters").add_argument
    add("--min-words", type=int, default=1, help="of an answer (1)")
    add("--max-words", type=int, help="of an answer")
    add("--language", action="append", default=[], help="en, fr, zh, ...; repeatable")
    add("--keep-refusals", action="store_true", help="answers that refuse stay")
    add("--near-duplicates", type=float, default=0.8, help="similarity of prompts; 0: off (0.8)")
    add("--judges", metavar="FILE", help="YAML file of at least three judges")
    add("--criteria", metavar="TEXT", help="what the judges grade by")
    add("--min-score", type=float, default=0.5, help="least grade, of 0 to 1 (0.5)")
