"""`fastpost ppo`: proximal policy optimisation with `fastpost.PPOTrainer`."""

from __future__ import annotations

from fastpost.cli.rewards import RewardedRunFields, rewards_of
from fastpost.cli.train import Command, run

COMMAND = Command(
    name="ppo",
    summary=(
        "Reinforcement learning with a value head and a KL penalty. Rows have a prompt, and the "
        "columns the rewards read."
    ),
    method_fields=(
        "num_generations",
        "max_completion_length",
        "temperature",
        "num_ppo_epochs",
        "num_mini_batches",
        "kl_coef",
        "kl_target",
        "cliprange",
        "entropy_coef",
        "reward_weights",
    ),
    run_fields=RewardedRunFields,
)
COLUMNS = [("prompt",)]


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    from fastpost import PPOConfig, PPOTrainer  # heavy: torch and transformers

    return run(COMMAND, argv, COLUMNS, PPOConfig, PPOTrainer, rewards_of)
