"""SmolLM2-135M learns to answer sums from their reward alone: GRPO, on a CPU, in minutes.

    python examples/grpo_reasoning.py

The problems are reasoning-gym's `chain_sum` ("17 - 42 ="), the reward is the task's own scorer on
the whole reply: 1 for the bare right number, less for the right number among other words, else 0.
The instruct model explains and never just answers, so that it would meet no reward: 0 of 48 sampled
replies have full marks. A handful of supervised steps shows it the form of an answer; from there on
it learns by reward alone. Held-out problems are asked before and after that, and greedy answers
scored by the same scorer.

Where the time goes: weights are trained in fp32 under bf16 autocast, completions come from a bf16
copy of them (`rollout_dtype`), and the eight completions of a problem share it in the update.
"""

from __future__ import annotations

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

TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
SYSTEM_PROMPT = "You are a careful calculator. Reply with the final answer only."
MAX_NEW_TOKENS = 12
GROUP = 8  # completions of a problem
PROBLEMS_PER_STEP = 6
STEPS = 40
SFT_STEPS = 8
SFT_ROWS = 16  # of a step
HELD_OUT = 96


@dataclass(frozen=True)
class Result:
    """What the run did.

    Attributes:
        before: mean reward of greedy answers to held-out problems at the start.
        after: the same at the end.
        exact_before: share of held-out problems with full marks at the start.
        exact_after: the same at the end.
        generation_seconds: time spent sampling.
        training_seconds: time of the whole training, sampling included.
        log: mean reward of the sampled completions, step by step.
    """

    before: float
    after: float
    exact_before: float
    exact_after: float
    generation_seconds: float
    training_seconds: float
    log: list[float]

    def __str__(self) -> str:
        update = self.training_seconds - self.generation_seconds
        return (
            f"held-out reward {self.before:.3f} -> {self.after:.3f}, "
            f"exact answers {self.exact_before:.1%} -> {self.exact_after:.1%}\n"
            f"{len(self.log)} steps in {self.training_seconds:.0f} s: "
            f"generation {self.generation_seconds:.0f} s, update {update:.0f} s"
        )


def main(steps: int = STEPS, output_dir: str = "grpo_reasoning") -> Result:
    """Train for `steps` steps and ask the held-out problems before and after."""
    folder = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held_out = reasoning_gym.create_dataset("chain_sum", size=HELD_OUT, seed=1_000_000, **TASK)
    problems = reasoning_gym.create_dataset("chain_sum", size=10_000, seed=1, **TASK)
    rows = training_rows(problems, held_out)
    show_the_form(model, tokenizer, rows, output_dir)
    trainer = GRPOTrainer(
        model,
        reasoning_gym_reward(problems, answer_tag=None),
        GRPOConfig(
            output_dir,
            max_steps=steps,
            num_generations=GROUP,
            per_device_train_batch_size=PROBLEMS_PER_STEP * GROUP,
            max_completion_length=MAX_NEW_TOKENS,
            learning_rate=2e-5,
            adam_beta2=0.95,
            warmup_steps=2,
            lr_scheduler_type="constant_with_warmup",
            bf16=True,
            rollout_dtype="bfloat16",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        rows.select(range(SFT_STEPS * SFT_ROWS, len(rows))),
        processing_class=tokenizer,
    )
    before = held_out_marks(model, tokenizer, held_out)
    trainer.rollout = timed = TimedRollout(trainer.rollout)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    after = held_out_marks(model, tokenizer, held_out)
    print(trainer.engine.report())
    return Result(
        before=sum(before) / HELD_OUT,
        after=sum(after) / HELD_OUT,
        exact_before=before.count(1.0) / HELD_OUT,
        exact_after=after.count(1.0) / HELD_OUT,
        generation_seconds=timed.seconds,
        training_seconds=seconds,
        log=[entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
    )


def show_the_form(model: Any, tokenizer: Any, rows: Dataset, output_dir: str) -> None:
    """A few supervised steps on bare answers."""
    examples = rows.select(range(SFT_STEPS * SFT_ROWS)).map(
        lambda row: {"completion": [{"role": "assistant", "content": row["answer"]}]},
        remove_columns=["answer", "index"],
    )
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir,
            max_steps=SFT_STEPS,
            per_device_train_batch_size=SFT_ROWS,
            learning_rate=5e-5,
            bf16=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=examples,
        processing_class=tokenizer,
    )
    trainer.train()
    # Back to the plain model: the next trainer puts its own forward and autocast on it.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    trainer.engine.remove()


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


@torch.no_grad()
def held_out_marks(model: Any, tokenizer: Any, held_out: Any) -> list[float]:
    """The scorer's mark, 0 to 1, of the greedy answer to each held-out problem."""
    inputs = tokenizer.apply_chat_template(
        [prompt(entry["question"]) for entry in held_out],
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    replies = tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [
        held_out.score_answer(reply.strip(), entry)
        for reply, entry in zip(replies, held_out, strict=True)
    ]


class TimedRollout:
    """A rollout that measures another: whatever has `generate` can sample for a trainer."""

    def __init__(self, rollout: Rollout) -> None:
        self.seconds = 0.0
        self._rollout = rollout

    def generate(self, prompt_ids: list[list[int]]) -> Completions:
        started = time.monotonic()
        completions = self._rollout.generate(prompt_ids)
        self.seconds += time.monotonic() - started
        return completions


if __name__ == "__main__":
    print(main())
