"""`fastpost export`: a sharded checkpoint as a folder that transformers or PEFT loads."""

from __future__ import annotations

import argparse

from fastpost.cli.recipe import UsageError


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="fastpost export",
        description=__doc__,
        epilog="Host memory holds one tensor at a time. A checkpoint of adapters becomes "
        "adapter_model.safetensors, for the base it was trained on.",
    )
    parser.add_argument("checkpoint", help="checkpoint-N of a run with fsdp")
    parser.add_argument("output", help="a new folder")
    parser.add_argument(
        "--file-gb", type=float, default=5.0, help="most gigabytes (10^9) a weight file; 5"
    )
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help or the mistake
        return int(stop.code or 0)
    if not options.file_gb > 0:
        raise UsageError(f"--file-gb must be positive, got {options.file_gb}")
    from fastpost.checkpoints.export import export_checkpoint  # heavy

    try:
        exported = export_checkpoint(
            options.checkpoint, options.output, file_bytes=int(options.file_gb * 10**9)
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    what = f"adapter {', '.join(exported.adapters)}" if exported.adapters else "model"
    size = f"{exported.num_bytes / 10**6:,.1f} MB"
    print(f"{options.output}: {what}, {exported.tensors} tensors, {size}")
    return 0
