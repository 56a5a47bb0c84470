"""PPO learns: a tiny model a made-up preference, SmolLM2 to please a reward model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import fastpost

EXAMPLES = Path(__file__).parents[2] / "examples"


def vowels(completions: list[str], **_) -> list[float]:
    """Share of the characters that are vowels."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def test_a_tiny_model_learns_to_write_vowels(model, tokenizer, tmp_path) -> None:
    trainer = fastpost.PPOTrainer(
        model,
        vowels,
        fastpost.PPOConfig(
            str(tmp_path),
            per_device_train_batch_size=32,
            num_generations=4,
            num_mini_batches=2,
            num_ppo_epochs=2,
            max_steps=60,
            max_completion_length=8,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            kl_coef=0.02,
            logging_steps=4,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        Dataset.from_list([{"prompt": f"{i} ->"} for i in range(32)]),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert len(rewards) == 15 and rewards[0] < 0.1
    assert rewards[-1] > 0.5


@pytest.mark.slow(minutes=13)
def test_the_score_of_a_reward_model_rises(monkeypatch, tmp_path) -> None:
    """On held-out problems, which neither model was trained on."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import ppo_reward_model
    import ranking_reward_model

    _, ranked = ranking_reward_model.train(
        str(tmp_path / "scorer"), num_problems=160, num_held_out=50
    )
    print(f"sorted list ranked over the others: {ranked}")
    assert ranked["words"] > 0.9 and ranked["numbers"] > 0.6
    before, after = ppo_reward_model.train(
        str(tmp_path / "scorer"), str(tmp_path / "policy"), rollouts=8, num_held_out=96
    )
    for name, value in before.items():
        if name.startswith("eval_reward"):
            print(f"{name}: {value:.3f} before, {after[name]:.3f} after")
    assert after["eval_reward"] > before["eval_reward"] + 0.4
    assert torch.isfinite(torch.tensor(list(after.values()))).all()
    for name in ("ppo_reward_model", "ranking_reward_model", "reward_model"):
        sys.modules.pop(name)
