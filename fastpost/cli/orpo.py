"""`fastpost orpo`: preference training without a reference model with `fastpost.ORPOTrainer`."""

from __future__ import annotations

from fastpost.cli.train import Command, run

COMMAND = Command(
    name="orpo",
    summary=(
        "Preference training in one stage, without a reference model. Rows have prompt, chosen and "
        "rejected."
    ),
    method_fields=("beta",),
)
COLUMNS = [("prompt", "chosen", "rejected")]


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    from fastpost import ORPOConfig, ORPOTrainer  # heavy: torch and TRL

    return run(COMMAND, argv, COLUMNS, ORPOConfig, ORPOTrainer)
