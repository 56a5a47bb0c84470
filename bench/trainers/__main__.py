"""`python -m bench.trainers METHOD`: seconds a step and peak memory, ours against a peer.

Runs both in processes of their own, in turn, so that a machine that drifts drifts for both.
Prints a table and writes `bench/results/trainers_<method>_<answers>.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from bench.environment import RESULTS, ROOT, describe
from bench.trainers.methods import METHODS

# The first step of a process pays for allocation and kernel selection.
WARM_UP_STEPS = 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.trainers", description=__doc__)
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("--model", help="folder of a model; default: the embedded SmolLM2-135M")
    parser.add_argument(
        "--sequences", type=int, default=16, help="a step; half as many where rows are pairs"
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each, in turn")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--answers", choices=["short", "worked"], default="short", help="length of the responses"
    )
    parser.add_argument("--no-checkpointing", action="store_true")
    options = parser.parse_args()
    options.peer = METHODS[options.method].peer
    options.batch = options.sequences // METHODS[options.method].sequences_per_row
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], options.peer: []}
    for round_number in range(options.rounds):
        for engine in runs:
            runs[engine].append(_run(engine, options))
            median = statistics.median(_timed(runs[engine][-1:]))
            print(f"round {round_number + 1} {engine:6} {median:7.2f} s/step", flush=True)
    result = _summarise(options, runs)
    print(_table(options, result))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"trainers_{options.method}_{options.answers}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


def _run(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    model = options.model or _embedded_model()
    command = [sys.executable, "-m", "bench.trainers.child", "--engine", engine, "--model", model]
    command += ["--method", options.method, "--batch", str(options.batch)]
    command += ["--steps", str(options.steps + WARM_UP_STEPS), "--dtype", options.dtype]
    command += ["--answers", options.answers]
    command += ["--no-checkpointing"] if options.no_checkpointing else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _embedded_model() -> str:
    from fastpost.demo.smollm2 import smollm2_path

    return str(smollm2_path())


def _timed(runs: list[dict[str, Any]]) -> list[float]:
    return [seconds for run in runs for seconds in run["seconds"][WARM_UP_STEPS:]]


def _summarise(
    options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    engines = {}
    for engine, results in runs.items():
        seconds = _timed(results)
        engines[engine] = {
            "median_seconds": statistics.median(seconds),
            "min_seconds": min(seconds),
            "max_seconds": max(seconds),
            "peak_rss_mib": statistics.median(run["peak_rss_mib"] for run in results),
            "losses": results[0]["losses"],
        }
    ours, peer = engines["ours"], engines[options.peer]
    tokens = {name: round(count) for name, count in runs["ours"][0]["tokens_per_step"].items()}
    return {
        "method": options.method,
        "batch": options.batch,
        "answers": options.answers,
        "dtype": options.dtype,
        "checkpointing": not options.no_checkpointing,
        "engines": engines,
        "speed_up": peer["median_seconds"] / ours["median_seconds"],
        "memory_ratio": ours["peak_rss_mib"] / peer["peak_rss_mib"],
        "largest_loss_difference": max(
            abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=True)
        ),
        "tokens_per_step": tokens,
        # Work of a forward in units of the peer's: what no implementation could undercut.
        "token_floor": tokens["unique_tokens"] / tokens["padded_tokens"],
        "packing_share": runs["ours"][0]["pack_seconds"] / ours["median_seconds"],
        "fallbacks": runs["ours"][0]["fallbacks"],
        **describe("bench.trainers"),
    }


def _table(options: argparse.Namespace, result: dict[str, Any]) -> str:
    lines = [
        "",
        f"{options.method.upper()}, batch {options.batch}, {options.answers} answers, "
        f"{options.dtype}, "
        f"checkpointing {'on' if result['checkpointing'] else 'off'}",
        f"{'':10}{'s/step':>10}{'min':>8}{'max':>8}{'peak RSS':>12}",
    ]
    for engine, row in result["engines"].items():
        lines.append(
            f"{engine:10}{row['median_seconds']:10.2f}{row['min_seconds']:8.2f}"
            f"{row['max_seconds']:8.2f}{row['peak_rss_mib']:8.0f} MiB"
        )
    tokens = result["tokens_per_step"]
    lines += [
        f"speed-up {result['speed_up']:.2f}x, memory {result['memory_ratio']:.2f}x, "
        f"losses within {result['largest_loss_difference']:.1e}",
        f"tokens a step: {tokens['padded_tokens']} padded, {tokens['unique_tokens']} computed, "
        f"{tokens['scored_tokens']} scored; floor {result['token_floor']:.2f} of the padded work; "
        f"packing takes {result['packing_share']:.2%} of a step",
    ]
    if result["fallbacks"]:
        lines.append(f"fell back: {result['fallbacks']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
