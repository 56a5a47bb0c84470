"""The two training stages of the demo, each from one model folder to another.

Weights are trained in fp32 under bf16 autocast: the products run on the CPU's bf16 units, while
updates far smaller than a bf16 weight's resolution are kept. Each stage stores bf16, so what is
evaluated in memory is what a later reader loads.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastpost.demo.tasks import Message, sft_rows
from fastpost.progress import use_progress
from fastpost.trainers.dpo import DPOConfig, DPOTrainer
from fastpost.trainers.sft import SFTConfig, SFTTrainer

SFT_SEED = 1  # added to the demo's seed, so that every stage draws problems of its own

SFT_BATCH_ROWS = 16
DPO_BATCH_PAIRS = 16
MAX_LENGTH = 256  # the longest row has about 140 tokens


@dataclass(frozen=True)
class Stage:
    """What one stage of training reports.

    Attributes:
        log: every set of metrics the trainer logged, in order.
        tokens: the engine's counts (padded, row, unique, scored) over the stage's training.
        seconds: wall time of the stage, loading and saving included.
    """

    log: list[dict[str, float]]
    tokens: dict[str, int]
    seconds: float


def train_sft(
    source: Path, target: Path, *, steps: int, seed: int
) -> tuple[PreTrainedModel, Stage]:
    """Supervised fine-tuning on worked solutions; loads `source`, saves `target`.

    The model returned is the one trained: bf16, in evaluation mode and free of the engine.
    """
    started = time.monotonic()
    model, tokenizer = _load(source)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            **_arguments(target, steps, seed),
            per_device_train_batch_size=SFT_BATCH_ROWS,
            learning_rate=2e-4,
            # Every row ends with its answer: none may be cut.
            max_length=MAX_LENGTH,
        ),
        train_dataset=Dataset.from_list(sft_rows(steps * SFT_BATCH_ROWS, seed + SFT_SEED)),
        processing_class=tokenizer,
    )
    use_progress(trainer, "sft")
    trainer.train()
    return _finish(trainer, target, started)


def train_dpo(
    source: Path,
    target: Path,
    pairs: list[dict[str, list[Message]]],
    held_out_pairs: list[dict[str, list[Message]]],
    *,
    steps: int,
    seed: int,
) -> tuple[PreTrainedModel, Stage]:
    """Preference optimisation on `pairs`; loads `source`, saves `target`.

    The likelihood of the right solution stays in the loss ("sft"): the preference alone is content
    when both fall, as long as the wrong one falls further. Small steps: at 2e-5 the pairs are
    ranked better still, but the share of right greedy answers falls by several points.
    """
    started = time.monotonic()
    model, tokenizer = _load(source)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            **_arguments(target, steps, seed),
            per_device_train_batch_size=DPO_BATCH_PAIRS,
            per_device_eval_batch_size=DPO_BATCH_PAIRS,
            learning_rate=6e-6,
            max_length=MAX_LENGTH,
            beta=0.1,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 1.0],
            eval_strategy="steps",
            eval_steps=max(1, steps // 3),
        ),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(held_out_pairs),
        processing_class=tokenizer,
    )
    use_progress(trainer, "dpo")
    trainer.train()
    return _finish(trainer, target, started)


def load_plain(folder: Path) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer as any transformers user loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _load(folder: Path) -> tuple[PreTrainedModel, Any]:
    # A trainer and its callbacks refer to each other: without this, the optimizer state of the
    # stage before would stay until the collector happens to run.
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def _arguments(target: Path, steps: int, seed: int) -> dict[str, Any]:
    """Training arguments both stages share. One pass over just enough rows."""
    return {
        "output_dir": str(target),
        "max_steps": steps,
        "bf16": True,
        "gradient_checkpointing": False,  # everything fits, and time is what is short
        "adam_beta2": 0.95,  # a hundred steps are too few for a memory of a thousand
        "warmup_steps": max(1, steps // 10),
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
    }


def _finish(
    trainer: SFTTrainer | DPOTrainer, target: Path, started: float
) -> tuple[PreTrainedModel, Stage]:
    """Takes accelerate's and the engine's wrappers off the model and saves it in bf16."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.engine.remove()
    model.zero_grad(set_to_none=True)
    # Parameters only: `model.to` would round the rotary frequencies too, a buffer that every
    # loaded model has in fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.eval()
    model.save_pretrained(target)
    trainer.processing_class.save_pretrained(target)
    return model, Stage(
        log=[_numbers(entry) for entry in trainer.state.log_history],
        tokens=asdict(trainer.engine.stats),
        seconds=time.monotonic() - started,
    )


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}


__all__ = ["Stage", "load_plain", "train_dpo", "train_sft"]
