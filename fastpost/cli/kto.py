"""`fastpost kto`: preference training on single judged answers with `fastpost.KTOTrainer`."""

from __future__ import annotations

from fastpost.cli.train import Command, run

COMMAND = Command(
    name="kto",
    summary=(
        "Training on answers judged one by one. Rows have prompt, completion and label (true: "
        "desirable)."
    ),
    method_fields=(
        "beta",
        "loss_type",
        "desirable_weight",
        "undesirable_weight",
        "precompute_ref_log_probs",
    ),
)
COLUMNS = [("prompt", "completion", "label")]


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    from fastpost import KTOConfig, KTOTrainer  # heavy: torch and TRL

    return run(COMMAND, argv, COLUMNS, KTOConfig, KTOTrainer)
