"""One trainer in one process: a few steps, timed one by one, printed as a line of JSON.

A process of its own, so that peak memory is this trainer's and no warm cache is inherited.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
import warnings
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TRL_EXPERIMENTAL_SILENCE="1",
)

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from transformers.utils import logging

from bench.trainers.fixed_rollout import FixedRollout, reward
from bench.trainers.methods import GROUP, METHODS, Method
from bench.trainers.padded_forward import use_padded_forward


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=sorted(METHODS), required=True)
    parser.add_argument("--engine", choices=["ours", "trl", "padded"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], required=True)
    parser.add_argument("--answers", choices=["short", "worked"], required=True)
    parser.add_argument("--no-checkpointing", action="store_true")
    print(json.dumps(measure(parser.parse_args())))


class Clock(TrainerCallback):
    """Seconds and loss of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.began = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.began = now

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and loss of each step, tokens of a step, peak resident memory of the process."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    method = METHODS[options.method]
    clock = Clock()
    packing_seconds = _time_packing() if options.engine == "ours" else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(method, options, clock, folder)
        if options.engine == "padded":
            for engine in filter(None, (trainer.engine, trainer.ref_engine)):
                use_padded_forward(engine)
        trainer.train()
    result = {
        "seconds": clock.seconds,
        "losses": clock.losses,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if options.engine == "ours":
        stats = vars(trainer.engine.stats)
        result["tokens_per_step"] = {k: v / options.steps for k, v in stats.items()}
        result["fallbacks"] = dict(trainer.engine.fallbacks)
        result["pack_seconds"] = sum(packing_seconds) / options.steps
    return result


def _trainer(method: Method, options: argparse.Namespace, clock: Clock, folder: str) -> Any:
    trainer_class, config_class = method.classes(options.engine)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dataset = method.dataset(options.batch * options.steps, options.answers)
    config = config_class(
        folder,
        per_device_train_batch_size=options.batch,
        max_steps=options.steps,
        learning_rate=1e-5,
        gradient_checkpointing=not options.no_checkpointing,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **method.config,
    )
    if method.needs_reward:
        trainer_class = _with_fixed_rollout(method, trainer_class, dataset, tokenizer)
    trainer = trainer_class(
        model=_model(method, options, tokenizer),
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[clock],
        **({"reward_funcs": reward} if method.needs_reward else {}),
    )
    if method.trainer == "PPO":
        trainer.rollout = FixedRollout(dataset, tokenizer, num_completions=GROUP)
    return trainer


def _model(method: Method, options: argparse.Namespace, tokenizer: Any) -> Any:
    dtype = getattr(torch, options.dtype)
    if method.trainer != "Reward":
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=1, dtype=dtype, pad_token_id=tokenizer.pad_token_id
    )


def _with_fixed_rollout(
    method: Method, trainer_class: type[Any], dataset: Dataset, tokenizer: Any
) -> type[Any]:
    if method.trainer == "PPO":
        return trainer_class
    if method.trainer == "OnlineDPO":
        return FixedRollout(dataset, tokenizer, num_completions=2).paired(trainer_class)
    return FixedRollout(dataset, tokenizer, num_completions=GROUP).grouped(trainer_class)


def _time_packing() -> list[float]:
    """Seconds of every call to `pack` from here on."""
    from fastpost import backbone

    stock, seconds = backbone.pack, []

    def pack(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return stock(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    backbone.pack = pack
    return seconds


if __name__ == "__main__":
    main()
