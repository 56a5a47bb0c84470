"""SmolLM2-135M teaches itself sums: it answers, the right answers are kept, it is trained on them.

    python examples/rejection_sampling.py

The problems are reasoning-gym's `chain_sum` with two terms of one digit ("3 - 8 ="), the grader is
the task's own. Six supervised steps show the form of an answer; from there on every row the model
is trained on is one that it wrote. Problems that are asked before and after never occur in
training. Killed, it goes on where it was when it is given the same `--output`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from fastpost import SFTConfig, SFTTrainer
from fastpost.chat_model.interface import Sampling
from fastpost.demo.smollm2 import smollm2_path
from fastpost.loops.rejection_sampling import rejection_sampling
from fastpost.loops.run import LoopResult
from fastpost.loops.samplers import local_sampler
from fastpost.rewards.reasoning import reasoning_gym_reward

TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
SYSTEM_PROMPT = "You are a careful calculator. Reply with the final answer only."
EXAM_SEED = 1_000_000  # far from the training seed: item i is drawn from seed + i
EXAM_PROBLEMS = 64
FORM_ROWS = 96  # shown by supervised steps
PROBLEMS = 96  # of a round
ROUNDS = 3
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "bf16": True,
    "gradient_checkpointing": False,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),
}


def main(output: str, rounds: int = ROUNDS) -> LoopResult:
    """Show the form, run the loop; its metrics hold the share of right greedy answers."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    exam = reasoning_gym.create_dataset("chain_sum", size=EXAM_PROBLEMS, seed=EXAM_SEED, **TASK)
    asked = {entry["question"]: entry for entry in exam}
    problems = reasoning_gym.create_dataset("chain_sum", size=2_000, seed=0, **TASK)
    rows: dict[str, dict[str, Any]] = {}
    for index, entry in enumerate(problems):
        if entry["question"] not in asked:
            row = {"prompt": prompt(entry["question"]), "index": index, "answer": entry["answer"]}
            rows.setdefault(entry["question"], row)
    shown, left = list(rows.values())[:FORM_ROWS], list(rows.values())[FORM_ROWS:]
    start = show_the_form(shown, tokenizer, Path(output) / "form")
    greedy = local_sampler(Sampling(temperature=0.0, max_tokens=8), batch_size=EXAM_PROBLEMS)

    def evaluate(folder: str) -> dict[str, float]:
        replies = greedy(folder)([prompt(question) for question in asked], seed=0)
        marks = [
            exam.score_answer((reply or "").strip(), entry)
            for reply, entry in zip(replies, asked.values(), strict=True)
        ]
        return {"right": marks.count(1.0) / len(marks)}

    return rejection_sampling(
        str(start),
        tokenizer,
        left[:PROBLEMS],
        reasoning_gym_reward(problems, answer_tag=None),
        Path(output) / "loop",
        sampler=local_sampler(Sampling(temperature=1.0, max_tokens=8), batch_size=96),
        threshold=1.0,
        samples=4,
        iterations=rounds,
        sft=TRAINING | {"learning_rate": 2e-5, "num_train_epochs": 2},
        evaluate=evaluate,
        batch_size=96,
    )


def prompt(question: str) -> list[dict[str, str]]:
    """The conversation that ends with the question."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question},
    ]


def show_the_form(rows: list[dict[str, Any]], tokenizer: Any, folder: Path) -> Path:
    """A few supervised steps on bare answers; done once."""
    if not (folder / "model" / "config.json").exists():
        answers = [[{"role": "assistant", "content": row["answer"]}] for row in rows]
        trainer = SFTTrainer(
            str(smollm2_path()),
            SFTConfig(str(folder), learning_rate=1e-4, num_train_epochs=1, **TRAINING),
            train_dataset=Dataset.from_list(
                [
                    {"prompt": row["prompt"], "completion": answer}
                    for row, answer in zip(rows, answers, strict=True)
                ]
            ),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model(str(folder / "model"))
    return folder / "model"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rejection sampling on sums with SmolLM2")
    parser.add_argument("--output", help="folder to go on in; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for entry in main(arguments.output or temporary, arguments.rounds).metrics:
            print({k: v for k, v in entry.items() if k in ("iteration", "solved", "right")})
