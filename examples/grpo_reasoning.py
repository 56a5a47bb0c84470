"""SmolLM2-135M learns to do sums from their reward alone: GRPO, on a CPU, in minutes.

    python examples/grpo_reasoning.py

The problems are reasoning-gym's `chain_sum` with two terms of one digit ("3 - 8 ="), the reward is
the task's own scorer on the whole reply: 1 for the bare right number, less for the right number
among other words, else 0. The instruct model explains and never just answers: none of 48 sampled
replies had full marks, so there would be nothing to reinforce. Six supervised steps show it the
form of an answer, with which it gets about half of the sums right; from there on it learns by
reward alone.

Problems that are asked before and after never occur in training. Reported are the mean reward of
sampled replies, which is what GRPO maximises, and the share of right greedy answers.

Where the time goes: weights are trained in fp32 under bf16 autocast, completions come from a bf16
copy of them (`rollout_dtype`), and the eight completions of a problem share it in the update.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import reasoning_gym
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpost import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from fastpost.demo.smollm2 import smollm2_path
from fastpost.rewards.reasoning import reasoning_gym_reward
from fastpost.rollout.interface import Completions, Rollout

TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
SYSTEM_PROMPT = "You are a careful calculator. Reply with the final answer only."
MAX_NEW_TOKENS = 8
GROUP = 8  # completions of a problem
PROBLEMS_PER_STEP = 6
STEPS = 30
SFT_STEPS = 6
SFT_ROWS = 16  # of a supervised step
EXAM_SAMPLES = 2  # sampled replies to a held-out problem
EXAM_SEED = 1_000_000  # far from the training seed: item i is drawn from seed + i


@dataclass(frozen=True)
class Exam:
    """How the model did on held-out problems.

    Attributes:
        reward: mean of the scorer's marks, 0 to 1, over sampled replies.
        accuracy: share of problems whose greedy answer has full marks.
    """

    reward: float
    accuracy: float


@dataclass(frozen=True)
class Result:
    """What the run did.

    Attributes:
        before: the exam after the supervised steps, before the first of GRPO.
        after: the exam at the end.
        rewards: mean reward of the sampled completions of each step.
        generation_seconds: time spent sampling in training.
        training_seconds: time of GRPO training, sampling included.
    """

    before: Exam
    after: Exam
    rewards: list[float]
    generation_seconds: float
    training_seconds: float

    def __str__(self) -> str:
        update = self.training_seconds - self.generation_seconds
        return (
            f"held-out reward {self.before.reward:.3f} -> {self.after.reward:.3f}, "
            f"right greedy answers {self.before.accuracy:.1%} -> {self.after.accuracy:.1%}\n"
            f"{len(self.rewards)} steps in {self.training_seconds:.0f} s: "
            f"generation {self.generation_seconds:.0f} s, update {update:.0f} s"
        )


def main(output_dir: str, steps: int = STEPS) -> Result:
    """Train for `steps` steps and examine before and after."""
    folder = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held_out = reasoning_gym.create_dataset("chain_sum", size=64, seed=EXAM_SEED, **TASK)
    problems = reasoning_gym.create_dataset("chain_sum", size=4_000, seed=0, **TASK)
    rows = training_rows(problems, held_out)
    show_the_form(model, tokenizer, rows.select(range(SFT_STEPS * SFT_ROWS)), output_dir)
    trainer = GRPOTrainer(
        model,
        reasoning_gym_reward(problems, answer_tag=None),
        GRPOConfig(
            max_steps=steps,
            num_generations=GROUP,
            per_device_train_batch_size=PROBLEMS_PER_STEP * GROUP,
            max_completion_length=MAX_NEW_TOKENS,
            learning_rate=2e-5,
            adam_beta2=0.95,
            warmup_steps=2,
            lr_scheduler_type="constant_with_warmup",
            rollout_dtype="bfloat16",
            **shared_arguments(output_dir),
        ),
        rows.select(range(SFT_STEPS * SFT_ROWS, len(rows))),
        processing_class=tokenizer,
    )
    before = examine(model, tokenizer, held_out)
    print(f"before GRPO: {before}", flush=True)
    trainer.rollout = timed = TimedRollout(trainer.rollout)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    print(trainer.engine.report())
    return Result(
        before=before,
        after=examine(model, tokenizer, held_out),
        rewards=[entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        generation_seconds=timed.seconds,
        training_seconds=seconds,
    )


def training_rows(problems: Any, held_out: Any) -> Dataset:
    """Problems that are not held out, with the index by which the reward finds their answer."""
    hidden = {entry["question"] for entry in held_out}
    return Dataset.from_list(
        [
            {"prompt": prompt(entry["question"]), "index": index, "answer": entry["answer"]}
            for index, entry in enumerate(problems)
            if entry["question"] not in hidden
        ]
    )


def prompt(question: str) -> list[dict[str, str]]:
    """The conversation that ends with the question."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question},
    ]


def show_the_form(model: Any, tokenizer: Any, rows: Dataset, output_dir: str) -> None:
    """A few supervised steps on bare answers."""
    trainer = SFTTrainer(
        model,
        SFTConfig(
            max_steps=SFT_STEPS,
            per_device_train_batch_size=SFT_ROWS,
            learning_rate=1e-4,
            **shared_arguments(output_dir),
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": row["prompt"],
                    "completion": [{"role": "assistant", "content": row["answer"]}],
                }
                for row in rows
            ]
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    # Back to the plain model: the next trainer puts its own autocast and forward on it.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    trainer.engine.remove()


def shared_arguments(output_dir: str) -> dict[str, Any]:
    """Training arguments of both stages."""
    return {
        "output_dir": output_dir,
        "bf16": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }


@torch.no_grad()
def examine(model: Any, tokenizer: Any, held_out: Any) -> Exam:
    """Replies to each held-out problem, sampled and greedy, marked by the task's scorer."""
    entries = list({entry["question"]: entry for entry in held_out}.values())
    inputs = tokenizer.apply_chat_template(
        [prompt(entry["question"]) for entry in entries],
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    model.eval()

    def marks(**sampling: Any) -> list[float]:
        with torch.autocast(model.device.type, torch.bfloat16):
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **sampling)
        replies = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        asked = [entry for entry in entries for _ in range(len(replies) // len(entries))]
        return [
            held_out.score_answer(reply.strip(), entry)
            for reply, entry in zip(replies, asked, strict=True)
        ]

    torch.manual_seed(0)
    sampled = marks(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=EXAM_SAMPLES
    )
    greedy = marks(do_sample=False)
    model.train()
    return Exam(sum(sampled) / len(sampled), greedy.count(1.0) / len(greedy))


class TimedRollout:
    """A rollout that measures another: whatever has `generate` can sample for a trainer."""

    def __init__(self, rollout: Rollout) -> None:
        self.seconds = 0.0
        self._rollout = rollout

    def generate(self, prompt_ids: list[list[int]]) -> Completions:
        """Complete every prompt once, under the current weights."""
        started = time.monotonic()
        completions = self._rollout.generate(prompt_ids)
        self.seconds += time.monotonic() - started
        return completions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GRPO on sums with SmolLM2")
    parser.add_argument("--output", default=None, help="folder for logs; default: a temporary one")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(main(arguments.output or folder, arguments.steps))
