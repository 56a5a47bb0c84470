"""The result in Markdown."""

from __future__ import annotations

from typing import Any

from bench.scale.jobs import WAYS

__all__ = ["report"]

GIB = 2**30


def report(result: dict[str, Any]) -> list[str]:
    """The result in Markdown."""
    lines = [
        "",
        "| traced | GPUs | tokens: padded -> ours | TFLOP a GPU: TRL -> ours | ratio "
        "| peak GiB: TRL -> ours | activations and head GiB: TRL -> ours | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["steps"]:
        sides = (row["TRL"], row["ours"])
        flops, peaks, acts = (
            " -> ".join(
                f"{side[key] / unit:,.1f}"
                + ("" if key != "peak_bytes" or side["fits"] else " (no)")
                for side in sides
            )
            for key, unit in (("flops", 1e12), ("peak_bytes", GIB), ("activation_bytes", GIB))
        )
        lines.append(
            f"| {row['model']} {row['method'].upper()} {row['adapter']} | {row['gpus']} "
            f"| {row['padded_tokens']:,} -> {row['ours']['tokens']:,} | {flops} "
            f"| {row['flops_ratio']:.2f} | {peaks} | {acts} | {row['activation_ratio']:.2f} |"
        )
    lines += ["", "| longest row of SFT, traced | " + " | ".join(WAYS) + " |", "|---|---|---|---|"]
    rows: dict[str, list[str]] = {}
    for row in result["longest"]:
        tokens = f"{row['tokens']:,}" if row["tokens"] else "none"
        rows.setdefault(f"{row['model']} {row['adapter']}", []).append(tokens)
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    lines += ["", "| promised | traced | |", "|---|---|---|"]
    for row in result["bars"]:
        lines.append(f"| {row['bar']} | {row['found']} | {'met' if row['met'] else 'MISSED'} |")
    return [*lines, "", f"Traced in {result['processor_seconds']} s of one processor."]
