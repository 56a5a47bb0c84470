"""`fastpost ppo`: proximal policy optimisation with `fastpost.PPOTrainer`."""

from __future__ import annotations

from fastpost.cli.rewards import RewardedRunFields, reward_functions
from fastpost.cli.train import Command, prepare, train_and_save

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

    job = prepare(COMMAND, argv, PPOConfig, COLUMNS)
    if job is None:
        return 0
    trainer = PPOTrainer(
        model=job.fields.model,
        reward_funcs=reward_functions(job.fields.reward),
        args=job.config,
        train_dataset=job.train_data,
        eval_dataset=job.eval_data,
        peft_config=job.fields.lora_config(),
    )
    return train_and_save(trainer, "ppo")
