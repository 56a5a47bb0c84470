"""`fastpost rloo`: REINFORCE leave-one-out with `fastpost.RLOOTrainer`."""

from __future__ import annotations

from fastpost.cli.rewards import RewardedRunFields, rewards_of
from fastpost.cli.train import Command, run

COMMAND = Command(
    name="rloo",
    summary=(
        "Reinforcement learning with the other answers to a prompt as baseline. Rows have a "
        "prompt, and the columns the rewards read."
    ),
    method_fields=(
        "num_generations",
        "max_completion_length",
        "temperature",
        "beta",
        "reward_weights",
        "use_vllm",
    ),
    run_fields=RewardedRunFields,
)
COLUMNS = [("prompt",)]


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    from fastpost import RLOOConfig, RLOOTrainer  # heavy: torch and TRL

    return run(COMMAND, argv, COLUMNS, RLOOConfig, RLOOTrainer, rewards_of)
