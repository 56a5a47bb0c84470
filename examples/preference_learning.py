"""Teach a small model to prefer right answers, with KTO, ORPO, SimPO, or DPO on 4-bit weights.

    python examples/preference_learning.py --method simpo

SmolLM2-135M-Instruct cannot reverse a list of words: asked for it, it prefers a nearly reversed
list to the right one in most problems. The problems come from reasoning-gym; a minute or two of
LoRA training on two CPU cores turns that round on problems it has never seen. `--method dpo` trains
a DoRA adapter with LoRA+ rates on weights in 4-bit NormalFloat (QLoRA); its reference is the model
with the adapter switched off. Needs `pip install "fastpost[demo]"`; nothing else is downloaded.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from typing import Any

import reasoning_gym
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpost
from fastpost.adapters.nf4_coverage import coverage_of
from fastpost.adapters.preset import BEST_LORA_PLUS_RATIO, best_adapter
from fastpost.demo.smollm2 import smollm2_path

PAIRS_PER_STEP = 8
HELD_OUT_PAIRS = 100


def reversal_pairs(num_pairs: int, seed: int) -> list[dict[str, Any]]:
    """Different problems, each with its answer and one in which two neighbours changed places."""
    problems = reasoning_gym.create_dataset(
        "word_sequence_reversal", size=2 * num_pairs, seed=seed, min_words=3, max_words=4
    )
    choose = random.Random(seed)
    pairs: dict[str, dict[str, Any]] = {}
    for problem in problems:
        right = problem["answer"].split(", ")
        wrong, i = list(right), choose.randrange(len(right) - 1)
        wrong[i], wrong[i + 1] = wrong[i + 1], wrong[i]
        if wrong == right:  # the same word twice
            continue
        question = f"Reverse the order of these words: {', '.join(reversed(right))}"
        pairs[question] = {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": ", ".join(right)}],
            "rejected": [{"role": "assistant", "content": ", ".join(wrong)}],
        }
    return list(pairs.values())[:num_pairs]


def labelled_rows(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs as KTO takes them: single answers, labelled.

    Each batch holds both answers to its problems (their prompts are computed once), first all good
    ones, then all bad ones, so that an answer's neighbour in the batch belongs to another problem.
    """
    rows = []
    for start in range(0, len(pairs), PAIRS_PER_STEP):
        for side in ("chosen", "rejected"):
            for pair in pairs[start : start + PAIRS_PER_STEP]:
                row = {"prompt": pair["prompt"], "completion": pair[side]}
                rows.append(row | {"label": side == "chosen"})
    return rows


@torch.no_grad()
def preference_accuracy(model: Any, tokenizer: Any, pairs: list[dict[str, Any]]) -> float:
    """Share of the pairs whose right answer has the higher log-prob per token.

    The model has the engine's forward: `fused_lm_head=True` returns log-probs and builds no logits.
    """
    was_training = model.training
    model.eval()
    rows = []
    for pair in pairs:
        prompt = tokenizer.apply_chat_template(
            pair["prompt"], add_generation_prompt=True, tokenize=False
        )
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
            rows.append((len(tokenizer(prompt).input_ids), tokenizer(text).input_ids))
    means = []
    for start in range(0, len(rows), 40):  # 20 pairs: the two rows of a pair share their prompt
        batch = rows[start : start + 40]
        inputs = tokenizer.pad({"input_ids": [ids for _, ids in batch]}, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for label, (prompt_length, _) in zip(labels, batch, strict=True):
            label[:prompt_length] = -100
        logps = model(**inputs, labels=labels, fused_lm_head=True).log_probs
        means.append(logps.sum(1) / (labels[:, 1:] != -100).sum(1))
    model.train(was_training)
    right, wrong = torch.cat(means).view(-1, 2).unbind(1)
    return (right > wrong).float().mean().item()


def make_trainer(method: str, model: Any, tokenizer: Any, pairs: list[Any], steps: int) -> Any:
    """The trainer of one method; data and length of the run are the same for all."""
    common = {
        "output_dir": tempfile.mkdtemp(prefix="preference-learning-"),
        "max_steps": steps,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 10,
        "logging_steps": max(1, steps // 10),
        "save_strategy": "no",
        "report_to": "none",
        "max_length": 128,
    }
    if method == "dpo":
        args = fastpost.DPOConfig(
            **common,
            learning_rate=1e-4,
            lora_plus_ratio=BEST_LORA_PLUS_RATIO,
            per_device_train_batch_size=PAIRS_PER_STEP,
            beta=0.1,
        )
        return fastpost.DPOTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=best_adapter(r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM"),
        )
    rest = {
        "processing_class": tokenizer,
        "peft_config": LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    }
    if method == "kto":
        args = fastpost.KTOConfig(
            **common,
            learning_rate=5e-4,
            per_device_train_batch_size=2 * PAIRS_PER_STEP,
            beta=0.5,
        )
        data = Dataset.from_list(labelled_rows(pairs))
        return fastpost.KTOTrainer(model, args=args, train_dataset=data, **rest)
    data = Dataset.from_list(pairs)
    common["per_device_train_batch_size"] = PAIRS_PER_STEP
    if method == "orpo":
        args = fastpost.ORPOConfig(**common, learning_rate=5e-4, beta=1.0)
        return fastpost.ORPOTrainer(model, args=args, train_dataset=data, **rest)
    args = fastpost.CPOConfig(
        **common,
        learning_rate=5e-4,
        loss_type="simpo",
        cpo_alpha=0.0,  # SimPO has no likelihood term
        beta=2.0,
        simpo_gamma=1.0,
    )
    return fastpost.CPOTrainer(model, args=args, train_dataset=data, **rest)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train with one method; held-out accuracy before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["kto", "orpo", "simpo", "dpo"], default="simpo")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if options.method == "dpo":
        model = fastpost.load_nf4(path)
        print(coverage_of(model))
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    pairs = reversal_pairs(options.steps * PAIRS_PER_STEP + HELD_OUT_PAIRS, options.seed)
    held_out, training = pairs[:HELD_OUT_PAIRS], pairs[HELD_OUT_PAIRS:]

    fastpost.accelerate_model(model)
    before = preference_accuracy(model, tokenizer, held_out)
    trainer = make_trainer(options.method, model, tokenizer, training, options.steps)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    print(trainer.engine.report())  # the trainer's engine took the place of the one above
    after = preference_accuracy(trainer.model, tokenizer, held_out)
    print(
        f"{options.method}: {len(training)} pairs in {seconds:.0f} s; right answers preferred on "
        f"{len(held_out)} held-out problems: {before:.1%} before, {after:.1%} after"
    )
    return before, after


if __name__ == "__main__":
    main()
