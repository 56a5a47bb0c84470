"""Iterated SFT → DPO: each cycle draws its own pairs from the model of now, the reference stays
(Xiong 2024, arXiv 2312.11456, algorithm 2, in batches; Dong 2024, arXiv 2405.07863).

    π_0 = SFT;   cycle t:  y_1 … y_n ~ π_{t−1}(y | x);  chosen: highest reward, rejected: lowest
    π_t = DPO from π_{t−1} on these pairs, against the reference π_0

Without the fixed reference the cycles' KL terms would add up to none. A prompt is a row
`{"prompt": [messages], ...}` whose other columns reach the reward; an SFT row has `prompt` and
`completion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpost.data.rows import Row
from fastpost.loops.candidates import (
    Candidate,
    Reward,
    draw,
    grade,
    preference_row,
    supervised_rows,
)
from fastpost.loops.rejection_sampling import summary
from fastpost.loops.run import Evaluate, Fields, LoopResult, LoopRun, Sampler, prompt_rows
from fastpost.trainers.dpo import DPOConfig, DPOTrainer
from fastpost.trainers.sft import SFTConfig, SFTTrainer

__all__ = ["best_and_worst", "iterated"]


def iterated(
    model: Any,
    tokenizer: Any,
    sft_rows: Any,
    prompts: Any,
    rewards: Reward | Sequence[Reward],
    folder: str | Path,
    *,
    sampler: Sampler,
    cycles: int = 3,
    prompts_per_cycle: int | None = None,
    samples: int = 4,
    min_margin: float = 0.0,
    reward_weights: Sequence[float] | None = None,
    sft: Fields | None = None,
    dpo: Fields | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> LoopResult:
    """Run the loop, or go on with it.

    Args:
        model, tokenizer, folder, seed, batch_size: see `LoopRun`.
        sft_rows: rows of the supervised stage; None where `model` has been through it.
        prompts: rows, see above.
        rewards: one or several functions in TRL's form; `reward_weights` one factor each.
        sampler: makes a chat model of a model folder; its temperature must be above 0.
        cycles: of drawing pairs and training on them.
        prompts_per_cycle: each cycle takes the next so many, from the first again after the last;
            None takes all in each.
        samples: answers drawn for a prompt.
        min_margin: the rewards of a pair differ by more than this.
        sft, dpo: fields of `SFTConfig` and `DPOConfig`.
        evaluate: grades a model folder after the supervised stage and after each cycle.

    Returns:
        The last model; metrics of a cycle: `iteration`, `reference` (the folder, always the same),
        `sampled`, `mean_reward` (of the answers drawn, before the cycle's training), `pairs`, the
        trainer's and `evaluate`'s figures. Entry 0 is the reference.

    Raises:
        ValueError: an option out of range, or no pair in a cycle.
        DataError: see `LoopRun`.
    """
    if cycles < 1 or samples < 2 or min_margin < 0:
        given = f"cycles={cycles}, samples={samples}, min_margin={min_margin}"
        raise ValueError(f"{given}; give at least 1, 2 and 0")
    if (dpo or {}).get("reference") is not None:
        raise ValueError("dpo.reference is set; the reference of this loop is the SFT checkpoint")
    options = {
        "rewards": rewards,
        "cycles": cycles,
        "prompts_per_cycle": prompts_per_cycle,
        "samples": samples,
        "min_margin": min_margin,
        "reward_weights": reward_weights,
        "sft": sft,
        "dpo": dpo,
    }
    data = {"prompts": prompts, "sft_rows": sft_rows}
    with LoopRun(
        "iterated",
        model,
        tokenizer,
        folder,
        data=data,
        options=options,
        seed=seed,
        batch_size=batch_size,
    ) as run:
        asked = prompt_rows(run.data["prompts"], "prompts")
        current: str | Path = run.start
        if sft_rows is not None:
            training = supervised_rows(run, "sft_rows")
            current = run.train("0-sft", SFTTrainer, SFTConfig, sft or {}, current, training)
        reference = current
        kept = {"reference": str(reference)}
        metrics: list[dict[str, Any]] = [
            {"iteration": 0, **kept, **run.measure("0-sft", evaluate, reference)}
        ]
        for cycle in range(1, cycles + 1):
            stage = f"{cycle}-dpo"
            rows = _of_cycle(asked, cycle, prompts_per_cycle)
            drawn_from = [row["prompt"] for row in rows]
            answers = draw(run, f"{stage}/sample", sampler, current, drawn_from, samples)
            graded = grade(run, f"{stage}/grade", rewards, rows, answers, reward_weights)
            pairs = [
                preference_row(row["prompt"], *pair)
                for row, group in zip(rows, graded, strict=True)
                if (pair := best_and_worst(group, min_margin)) is not None
            ]
            current = run.train(
                stage, DPOTrainer, DPOConfig, dpo or {}, current, pairs, reference=reference
            )
            counts = summary(graded) | {"pairs": len(pairs)}
            figures = run.trained(stage) | run.measure(stage, evaluate, current)
            metrics.append({"iteration": cycle, **kept, **counts, **figures})
        return run.result(current, metrics)


def best_and_worst(graded: Sequence[Candidate], min_margin: float) -> tuple[str, str] | None:
    """The ends of answers that are sorted best first; None where they are not further apart."""
    known = [(c.text, c.reward) for c in graded if c.reward is not None]
    if len(known) < 2 or not known[0][1] - known[-1][1] > min_margin:
        return None
    return known[0][0], known[-1][0]


def _of_cycle(rows: Sequence[Row], cycle: int, count: int | None) -> list[Row]:
    if count is None:
        return list(rows)
    if not 1 <= count <= len(rows):
        raise ValueError(f"prompts_per_cycle is {count}; give 1 to {len(rows)}, the prompts")
    return [rows[i % len(rows)] for i in range((cycle - 1) * count, cycle * count)]
