"""`python -m bench.readme`: writes the README's measured table from `bench/results/`."""

from __future__ import annotations

import json
from typing import Any

from bench.environment import RESULTS, ROOT
from bench.trainers.methods import METHODS

NAMES = {"online_dpo": "Online DPO update", "grpo": "GRPO update", "rloo": "RLOO update"}
NAMES |= {"ppo": "PPO update", "simpo": "SimPO", "reward": "Reward model"}
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))


def with_table(text: str) -> str:
    """The README's text with its table made anew."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def table() -> str:
    """Markdown of every trainer result, with the machine and commands that made it."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("trainers_*.json"))]
    lines = [
        "| SmolLM2-135M, CPU | tokens a step: padded → computed → scored "
        "| speed-up over TRL | peak memory | of TRL's |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(result) for result in results]
    machine, versions = results[0]["machine"], results[0]["versions"]
    lines += [
        "",
        "Ratios of medians, each from one run of `python -m bench.trainers METHOD` (the exact "
        "command is in `bench/results/`). PPO, which TRL has not, is compared with our trainer on "
        "a padded forward that builds logits. "
        f"{machine['cores']} cores of an {machine['processor']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, trl {versions['trl']}. "
        "Both sides: the same weights, data, batch and TRL defaults. Other machines "
        "give other ratios: run the command.",
    ]
    return "\n".join(lines)


def _row(result: dict[str, Any]) -> str:
    tokens = result["tokens_per_step"]
    name = NAMES.get(result["method"], result["method"].upper())
    method = METHODS[result["method"]]
    over = "" if method.peer == "trl" else " (over a padded forward)"
    peak = result["engines"]["ours"]["peak_rss_mib"] / 1024
    return (
        f"| {name}, {result['batch']} {method.unit}, {result['answers']} answers "
        f"| {tokens['padded_tokens']:,} → {tokens['unique_tokens']:,} → "
        f"{tokens['scored_tokens']:,} | {result['speed_up']:.1f}×{over} "
        f"| {peak:.1f} GiB | {result['memory_ratio']:.2f}× |"
    )


if __name__ == "__main__":
    main()
