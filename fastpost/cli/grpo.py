"""`fastpost grpo`: group-relative policy optimisation with `fastpost.GRPOTrainer`."""

from __future__ import annotations

from fastpost.cli.rewards import RewardedRunFields, rewards_of
from fastpost.cli.train import Command, run

COMMAND = Command(
    name="grpo",
    summary=(
        "Reinforcement learning on groups of answers to a prompt. Rows have a prompt, and the "
        "columns the rewards read."
    ),
    method_fields=(
        "num_generations",
        "max_completion_length",
        "temperature",
        "beta",
        "epsilon",
        "loss_type",
        "scale_rewards",
        "reward_weights",
        "use_vllm",
    ),
    run_fields=RewardedRunFields,
)
COLUMNS = [("prompt",)]


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    from fastpost import GRPOConfig, GRPOTrainer  # heavy: torch and TRL

    return run(COMMAND, argv, COLUMNS, GRPOConfig, GRPOTrainer, rewards_of)
