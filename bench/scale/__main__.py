"""`python -m bench.scale [--only WORD ...] [--store]`: ours against stock TRL at 8B, 32B, 70B.

Traced on tensors without memory, no GPU needed: FLOPs and peak bytes per GPU of one optimizer step,
the longest row that fits, and what was promised of them. docs/scale.md says what was traced, how.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from bench.environment import RESULTS, describe
from bench.scale.bars import BARS
from bench.scale.cases import ADAPTERS, MODELS, every_case
from bench.scale.jobs import WAYS, bar, compare, longest, quiet, timed
from bench.scale.report import report

__all__: list[str] = []

PARTS = ("bar", "step", "longest")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        help="bar, step, longest, a model, a method, an adapter: rows with all",
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--store", action="store_true", help="the whole parts traced, in bench/results/scale.json"
    )
    options = parser.parse_args()
    jobs: dict[str, tuple[Any, ...]] = {f"bar {name}": (bar, name) for name in BARS}
    jobs |= {f"step {case}": (compare, case) for case in every_case()}
    jobs |= {
        f"longest {model} {adapter} {way}": (longest, model, adapter, way)
        for model in MODELS
        for adapter in ADAPTERS
        for way in WAYS
    }
    words = options.only or []
    jobs = {name: job for name, job in jobs.items() if all(word in name.split() for word in words)}
    if not jobs:
        parser.error(f"no row contains all of {words}")
    found: dict[str, Any] = {}
    seconds = 0.0
    with ProcessPoolExecutor(options.processes, get_context("spawn"), quiet) as pool:
        futures: dict[Future[Any], str] = {
            pool.submit(timed, *job): name for name, job in jobs.items()
        }
        for future in as_completed(futures):
            found[futures[future]], spent = future.result()
            seconds += spent
            print(f"  traced {futures[future]}: {spent:.0f} s", flush=True)
    rows = {part: [found[name] for name in jobs if name.startswith(part)] for part in PARTS}
    rows["bar"] = [row for verdicts in rows["bar"] for row in verdicts]
    print("\n".join([*report(rows), "", f"Traced in {seconds:.0f} s of one processor."]))
    if options.store:
        whole = [part for part in PARTS if rows[part] and set(words) <= {part}]
        store({part: rows[part] for part in whole})


def store(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Puts parts that were traced whole in the place of those stored."""
    path = RESULTS / "scale.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    about = describe("bench.scale")
    stored |= {part: about | {"rows": rows[part]} for part in rows}
    path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
