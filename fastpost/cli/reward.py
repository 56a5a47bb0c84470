"""`fastpost reward`: a reward model with `fastpost.RewardTrainer`."""

from __future__ import annotations

from fastpost.cli.train import Command, prepare, train_and_save

COMMAND = Command(
    name="reward",
    summary=(
        "A reward model from preferences (Bradley-Terry). Rows have chosen + rejected, and a "
        "prompt or not; a margin column is used if there."
    ),
    method_fields=("center_rewards_coefficient",),
)
COLUMNS = [("chosen", "rejected")]


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    from fastpost import RewardConfig, RewardTrainer  # heavy: torch and TRL

    job = prepare(COMMAND, argv, RewardConfig, COLUMNS)
    if job is None:
        return 0
    trainer = RewardTrainer(
        model=job.fields.model,
        args=job.config,
        train_dataset=job.train_data,
        eval_dataset=job.eval_data,
        peft_config=job.fields.lora_config("SEQ_CLS"),
    )
    return train_and_save(trainer, "reward")
