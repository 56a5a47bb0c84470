"""`fastpost orpo`: preference training without a reference model with `fastpost.ORPOTrainer`."""

from __future__ import annotations

from fastpost.cli.train import Command, prepare, train_and_save

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

    job = prepare(COMMAND, argv, ORPOConfig, COLUMNS)
    if job is None:
        return 0
    trainer = ORPOTrainer(
        model=job.fields.model,
        args=job.config,
        train_dataset=job.train_data,
        eval_dataset=job.eval_data,
        peft_config=job.fields.lora_config(),
    )
    return train_and_save(trainer, "orpo")
