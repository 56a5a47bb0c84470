"""`fastpost sft`: supervised fine-tuning with `fastpost.SFTTrainer`."""

from __future__ import annotations

from fastpost.cli.train import Command, run

COMMAND = Command(
    name="sft",
    summary=(
        "Supervised fine-tuning. Rows have a text, messages, prompt + completion, or input_ids."
    ),
    method_fields=("packing", "completion_only_loss", "assistant_only_loss", "loss_type"),
)
COLUMNS = [
    ("dataset_text_field",),
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("input_ids",),
]


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    from fastpost import SFTConfig, SFTTrainer  # heavy: torch and TRL

    return run(COMMAND, argv, COLUMNS, SFTConfig, SFTTrainer)
