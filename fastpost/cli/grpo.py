"""`fastpost grpo`: group-relative policy optimisation with `fastpost.GRPOTrainer`."""

from __future__ import annotations

from fastpost.cli.rewards import RewardedRunFields, reward_functions
from fastpost.cli.train import Command, prepare, train_and_save

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

    job = prepare(COMMAND, argv, GRPOConfig, COLUMNS)
    if job is None:
        return 0
    trainer = GRPOTrainer(
        model=job.fields.model,
        reward_funcs=reward_functions(job.fields.reward),
        args=job.config,
        train_dataset=job.train_data,
        eval_dataset=job.eval_data,
        peft_config=job.fields.lora_config(),
    )
    return train_and_save(trainer, "grpo")
