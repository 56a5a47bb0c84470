"""The result in Markdown."""

from __future__ import annotations

from typing import Any

from bench.scale.jobs import WAYS

__all__ = ["report"]

GIB = 2**30


Rows = list[dict[str, Any]]


def report(rows: dict[str, Rows]) -> list[str]:
    """Tables of the parts that have rows: "step", "longest", "bar"."""
    lines: list[str] = []
    for part, table in (("step", _steps), ("longest", _longest), ("bar", _bars)):
        if rows.get(part):
            lines += ["", *table(rows[part])]
    return lines


def _steps(rows: Rows) -> list[str]:
    lines = [
        "| traced | GPUs | tokens: TRL → ours | TFLOP a GPU: TRL → ours | ratio | peak GiB: "
        "TRL → ours | activations and head GiB: TRL → ours | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sides = (row["TRL"], row["ours"])
        flops = " → ".join(f"{side['flops'] / 1e12:,.0f}" for side in sides)
        peaks = " → ".join(
            f"{side['peak_bytes'] / GIB:.1f}{'' if side['fits'] else ' (too much)'}"
            for side in sides
        )
        computed = " → ".join(f"{side['activation_bytes'] / GIB:.1f}" for side in sides)
        lines.append(
            f"| {row['model']} {row['method'].upper()} {row['adapter']} | {row['gpus']} "
            f"| {row['padded_tokens']:,} → {row['ours']['tokens']:,} | {flops} "
            f"| {row['flops_ratio']:.2f} | {peaks} | {computed} | {row['activation_ratio']:.2f} |"
        )
    return lines


def _longest(rows: Rows) -> list[str]:
    lines = ["| longest row of SFT | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        tokens = f"{row['tokens']:,}" if row["tokens"] else "none fits"
        table.setdefault(f"{row['model']} {row['adapter']}", {})[row["way"]] = tokens
    return lines + [
        f"| {name} | " + " | ".join(cells.get(way, "") for way in WAYS) + " |"
        for name, cells in table.items()
    ]


def _bars(rows: Rows) -> list[str]:
    lines = ["| promised | traced | |", "|---|---|---|"]
    return lines + [
        f"| {row['bar']} | {row['found']} | {'met' if row['met'] else 'MISSED'} |" for row in rows
    ]
