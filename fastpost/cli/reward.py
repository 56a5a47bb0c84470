"""`fastpost reward`: a reward model with `fastpost.RewardTrainer`."""

from __future__ import annotations

from fastpost.cli.train import Command, run

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

    return run(COMMAND, argv, COLUMNS, RewardConfig, RewardTrainer, task_type="SEQ_CLS")
