"""One trainer in one process: a few steps, timed one by one, printed as a line of JSON.

A process of its own, so that peak memory is this trainer's and no warm cache is inherited.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
import warnings
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=["sft", "dpo"], required=True)
    parser.add_argument("--engine", choices=["ours", "trl"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], required=True)
    parser.add_argument("--answers", choices=["short", "worked"], required=True)
    parser.add_argument("--no-checkpointing", action="store_true")
    print(json.dumps(measure(parser.parse_args())))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and loss of each step, tokens of a step, peak resident memory of the process."""
    warnings.simplefilter("ignore")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils import logging

    from bench.trainers.workload import dataset_for

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.engine == "ours":
        import fastpost as library
    else:
        import trl as library
    trainer_class = getattr(library, f"{options.method.upper()}Trainer")
    config_class = getattr(library, f"{options.method.upper()}Config")

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

        def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model,
            args=config_class(
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
            ),
            train_dataset=dataset_for(
                options.method, options.batch * options.steps, options.answers
            ),
            processing_class=tokenizer,
            callbacks=[clock],
        )
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
        result["pack_seconds"] = _pack_seconds(trainer)
    return result


def _pack_seconds(trainer: Any) -> float:
    """Median time to pack one batch; the policy and a separate reference pack once each."""
    from fastpost.packing import pack

    batch = next(iter(trainer.get_train_dataloader()))
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        pack(batch["input_ids"], batch["attention_mask"])
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
