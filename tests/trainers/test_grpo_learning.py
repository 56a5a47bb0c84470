"""Methods that sample learn: a tiny model a made-up preference, SmolLM2 to do sums."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from datasets import Dataset

import fastpost

EXAMPLES = Path(__file__).parents[2] / "examples"
METHODS = {
    "grpo": (fastpost.GRPOTrainer, fastpost.GRPOConfig, {"max_completion_length": 8}),
    "online-dpo": (
        fastpost.OnlineDPOTrainer,
        fastpost.OnlineDPOConfig,
        {"max_new_tokens": 8, "beta": 0.1},
    ),
}


def vowels(completions: list[str], **_) -> list[float]:
    """Share of the characters that are vowels."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


@pytest.mark.parametrize("method", METHODS)
def test_a_tiny_model_learns_to_write_vowels(method, model, tokenizer, tmp_path) -> None:
    trainer_class, config_class, config = METHODS[method]
    trainer = trainer_class(
        model,
        reward_funcs=vowels,
        args=config_class(
            str(tmp_path),
            per_device_train_batch_size=32,
            max_steps=28,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            rollout_dtype="bfloat16",
            gradient_checkpointing=False,
            logging_steps=4,
            save_strategy="no",
            report_to=[],
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            **config,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{i} ->"} for i in range(32)]),
        processing_class=tokenizer,
    )
    trainer.train()
    name = "objective/scores" if method == "online-dpo" else "reward"
    rewards = [line[name] for line in trainer.state.log_history if name in line]
    assert len(rewards) == 7 and rewards[0] < 0.15
    assert rewards[-1] > 0.4


@pytest.mark.slow(minutes=5)
def test_the_reward_of_held_out_sums_rises(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import grpo_reasoning

    result = grpo_reasoning.main(str(tmp_path))
    print(result)
    assert result.after.reward > result.before.reward + 0.15
    assert result.after.accuracy > result.before.accuracy
    assert sum(result.rewards[-5:]) > sum(result.rewards[:5]) + 5 * 0.15
    sys.modules.pop("grpo_reasoning")
