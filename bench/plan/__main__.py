"""`python -m bench.plan [CASE ...]`: predicted peak memory against what PyTorch's allocator gave.

Trainers on models of SmolLM2's kind take their trial step on the CPU (`trial_step=True`): two real
steps of the worst batch while PyTorch's profiler records every allocation; beside it stands what
the planner predicts, without having seen any of it. Cases marked "fitted" were in view when the
planner's model of a CPU was made; no figure of it was chosen by the others.
"""

from __future__ import annotations

import argparse
import gc
import json
from typing import Any

from bench.environment import RESULTS, describe
from bench.plan.runs import Case, trial_of

CHECKPOINTING = {"gradient_checkpointing": True}
# Of SmolLM2's kind, and of other widths and depths than SmolLM2-135M (576 wide, 30 layers).
NARROW = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 16,
}
SMALL = NARROW | {"num_hidden_layers": 8, "vocab_size": 24576}
WIDE = {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "num_hidden_layers": 6,
}
EIGHT_BITS = {"bf16": False, "optimizer": "adamw_8bit"} | CHECKPOINTING
CASES = {
    "full": Case("SFT", 1, 0, 1024, is_fitted=True),
    "full, checkpointing": Case("SFT", 1, 0, 1024, settings=CHECKPOINTING, is_fitted=True),
    "LoRA r 32": Case("SFT", 1, 0, 1024, rank=32, is_fitted=True),
    "LoRA r 32, checkpointing": Case(
        "SFT", 1, 0, 1024, rank=32, settings=CHECKPOINTING, is_fitted=True
    ),
    "full, 640": Case("SFT", 1, 0, 640),
    "narrower, full": Case("SFT", 1, 0, 768, model=NARROW),
    "small, LoRA r 8": Case("SFT", 2, 0, 384, rank=8, model=SMALL),
    "small, DoRA r 64, checkpointing": Case(
        "SFT", 1, 0, 896, rank=64, is_dora=True, settings=CHECKPOINTING, model=SMALL
    ),
    "small, 8-bit AdamW, bf16": Case("SFT", 1, 0, 768, settings=EIGHT_BITS, model=SMALL),
    "small, accumulated": Case(
        "SFT", 1, 0, 512, settings={"gradient_accumulation_steps": 2}, model=SMALL
    ),
    "small, DPO, full": Case("DPO", 1, 256, 256, settings=CHECKPOINTING, model=SMALL),
    "small, DPO, LoRA r 16": Case("DPO", 2, 128, 192, rank=16, model=SMALL),
    "small, reward model, LoRA r 16": Case("Reward", 2, 0, 384, rank=16, model=SMALL),
    "small, GRPO, full, beta 0.1": Case(
        "GRPO", 4, 128, 128, settings={"beta": 0.1} | CHECKPOINTING, model=SMALL
    ),
    "small, GRPO, LoRA r 16": Case("GRPO", 4, 192, 128, rank=16, model=SMALL),
    "wider, LoRA r 16": Case("SFT", 1, 0, 512, rank=16, model=WIDE),
    "LoRA r 32, checkpointing, long": Case("SFT", 1, 0, 3072, rank=32, settings=CHECKPOINTING),
}


def compare(name: str) -> dict[str, Any]:
    """One row: predicted and measured bytes, and by how much the first is off."""
    case = CASES[name]
    gc.collect()  # what an earlier case left must not be freed within
    found = trial_of(case)
    if found.predicted is None:
        raise RuntimeError(f"{name} was not predicted: {found.reason}")
    return {
        "case": name,
        "fitted": case.is_fitted,
        "seq": found.seq,
        "rows": found.rows,
        "predicted_bytes": found.predicted,
        "measured_bytes": found.measured,
        "error": found.predicted / found.measured - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}: all")
    parser.add_argument("--store", action="store_true", help="update bench/results/plan.json")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; choose from {', '.join(CASES)}")
    print("| SmolLM2's kind, CPU | rows x tokens | predicted MiB | measured MiB | error |")
    print("|---|---|---|---|---|")
    for name in options.cases or CASES:
        row = compare(name)
        print(
            f"| {name}{' (fitted)' if row['fitted'] else ''} | {row['rows']} x {row['seq']:,} | "
            f"{row['predicted_bytes'] / 2**20:,.1f} | {row['measured_bytes'] / 2**20:,.1f} | "
            f"{row['error']:+.1%} |",
            flush=True,
        )
        if options.store:
            _store(row)


def _store(row: dict[str, Any]) -> None:
    """Put a row in place of the one of its case."""
    path = RESULTS / "plan.json"
    stored = json.loads(path.read_text())["rows"] if path.exists() else []
    found = {old["case"]: old for old in stored if old["case"] in CASES} | {row["case"]: row}
    rows = [found[name] for name in CASES if name in found]
    path.write_text(json.dumps(describe("bench.plan") | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
