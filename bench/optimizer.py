"""`python -m bench.optimizer`: does AdamW with 8-bit states on bf16 weights learn as fp32 does?

SmolLM2-135M is fine-tuned on worked sums from the same rows, in their order, at the same rates by

    fp32      torch's AdamW on fp32 weights with fp32 states, products in bf16 (autocast)
    states    `AdamW8bit` on fp32 weights: 8-bit states alone
    8-bit     `AdamW8bit` on bf16 weights, rounded at random
    nearest   `AdamW8bit` on bf16 weights, rounded to nearest

once a seed, which draws the rows and the random rounding. Noise is what the seed changes: the
spread of the fp32 runs. The held-out rows are the same for all. Writes after each run
`bench/results/optimizer.json`; runs that are there with the same settings are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.environment import RESULTS, describe
from fastpost.demo.smollm2 import smollm2_path
from fastpost.demo.tasks import sft_rows
from fastpost.trainers.sft import SFTConfig, SFTTrainer
from fastpost_kernels import AdamW8bit

# Name -> dtype of the weights, class, options.
OPTIMIZERS: dict[str, tuple[torch.dtype, Any, dict[str, Any]]] = {
    "fp32": (torch.float32, torch.optim.AdamW, {"fused": True}),
    "states": (torch.float32, AdamW8bit, {}),
    "8-bit": (torch.bfloat16, AdamW8bit, {}),
    "nearest": (torch.bfloat16, AdamW8bit, {"stochastic_rounding": False}),
}
BETAS = (0.9, 0.95)
HELD_OUT_SEED = 10_000


def run(name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One fine-tuning: losses by step, and on held-out rows before and after."""
    dtype, optimizer_class, options = OPTIMIZERS[name]
    options = {"lr": settings["learning_rate"], "betas": BETAS} | options
    if optimizer_class is AdamW8bit:
        options["seed"] = seed
    folder = smollm2_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    before = [p.detach().clone() for p in model.parameters()]
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                output,
                max_steps=settings["steps"],
                per_device_train_batch_size=settings["rows"],
                per_device_eval_batch_size=settings["rows"],
                learning_rate=settings["learning_rate"],
                warmup_steps=settings["steps"] // 10,
                lr_scheduler_type="cosine",
                weight_decay=0.01,
                bf16=dtype == torch.float32,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=_rows(settings["steps"] * settings["rows"], seed),
            eval_dataset=_rows(settings["held_out_rows"], HELD_OUT_SEED, held_out=True),
            processing_class=AutoTokenizer.from_pretrained(folder),
            optimizer_cls_and_kwargs=(optimizer_class, options),
        )
        start = time.monotonic()
        # bf16 weights are the stored ones, fp32 weights equal them: once a seed is enough
        first = trainer.evaluate()["eval_loss"] if name == "fp32" else None
        trainer.train()
        last = trainer.evaluate()["eval_loss"]
        seconds = time.monotonic() - start
    pairs = list(zip(before, model.parameters(), strict=True))
    changed = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    return {
        "optimizer": name,
        "seed": seed,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "held_out_before": first,
        "held_out_after": last,
        "weights_changed": changed,
        "seconds": seconds,
    }


def _rows(count: int, seed: int, held_out: bool = False) -> Dataset:
    return Dataset.from_list(sft_rows(count, seed, held_out=held_out))


def summary(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row an optimizer and seed; below it the noise."""
    lines = [
        "| optimizer | seed | loss, last 20 steps | held-out loss: before → after | changed |",
        "|---|---|---|---|---|",
    ]
    for found in sorted(runs, key=lambda r: (list(OPTIMIZERS).index(r["optimizer"]), r["seed"])):
        start = "" if found["held_out_before"] is None else f"{found['held_out_before']:.4f} → "
        lines.append(
            f"| {found['optimizer']} | {found['seed']} | "
            f"{statistics.mean(found['losses'][-20:]):.4f} | {start}"
            f"{found['held_out_after']:.4f} | {100 * found['weights_changed']:.1f} % |"
        )
    ends = {
        name: [r["held_out_after"] for r in runs if r["optimizer"] == name] for name in OPTIMIZERS
    }
    if len(ends["fp32"]) > 1:
        spread = max(ends["fp32"]) - min(ends["fp32"])
        lines.append(f"\nNoise (spread of fp32 over seeds, held-out): {spread:.4f}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.optimizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=2, help="a step")
    parser.add_argument("--held-out-rows", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=int, help="runs of this call; the next one goes on")
    options = vars(parser.parse_args())
    torch.set_num_threads(options["threads"])
    settings = {key: options[key] for key in ("steps", "rows", "held_out_rows", "learning_rate")}
    path = RESULTS / "optimizer.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    runs = stored["runs"] if stored.get("settings") == settings else []
    done = {(r["optimizer"], r["seed"]) for r in runs}
    wanted = [(name, seed) for seed in options["seeds"] for name in OPTIMIZERS]
    for name, seed in [pair for pair in wanted if pair not in done][: options["limit"]]:
        runs.append(run(name, seed, settings))
        facts = describe("bench.optimizer") | {"settings": settings, "runs": runs}
        path.write_text(json.dumps(facts, indent=1) + "\n")
    print(summary(runs))


if __name__ == "__main__":
    main()
