"""Rejection-sampling fine-tuning: sample, grade, keep the best, train on it (Dong 2023,
arXiv 2304.06767, algorithm 1; Yuan 2023, arXiv 2308.01825).

    for every prompt x:  y_1 … y_n ~ π(y | x);   keep the best `keep` with r(x, y) >= threshold
    π' = SFT on the kept (x, y)

A prompt is a row `{"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}` whose other
columns reach the reward. With `iterations` > 1 the next round samples from the model that the last
one trained, and trains on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpost.loops.candidates import Candidate, Reward, draw, grade, sft_row
from fastpost.loops.run import Evaluate, Fields, LoopResult, LoopRun, Sampler, prompt_rows
from fastpost.trainers.sft import SFTConfig, SFTTrainer

__all__ = ["kept", "rejection_sampling", "summary"]


def rejection_sampling(
    model: Any,
    tokenizer: Any,
    prompts: Any,
    rewards: Reward | Sequence[Reward],
    folder: str | Path,
    *,
    sampler: Sampler,
    threshold: float,
    samples: int = 4,
    keep: int = 1,
    reward_weights: Sequence[float] | None = None,
    iterations: int = 1,
    sft: Fields | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> LoopResult:
    """Run the loop, or go on with it.

    Args:
        model, tokenizer, folder, seed, batch_size: see `LoopRun`.
        prompts: rows, see above.
        rewards: one or several functions in TRL's form; `reward_weights` one factor each.
        sampler: makes a chat model of a model folder; its temperature must be above 0.
        threshold: the least reward of an answer that is kept.
        samples: answers drawn for a prompt; equal ones count once.
        keep: answers kept of a prompt at most.
        iterations: rounds of sampling and training.
        sft: fields of `SFTConfig`.
        evaluate: grades a model folder, before the first round and after each.

    Returns:
        The last model; metrics of an iteration: `iteration`, `sampled`, `kept`, `solved` (share of
        prompts with an answer kept), `mean_reward`, the trainer's and `evaluate`'s figures. Entry 0
        is the model at the start.

    Raises:
        ValueError: an option out of range, or no answer reached the threshold.
        DataError: see `LoopRun`.
    """
    if min(samples, keep, iterations) < 1:
        raise ValueError(
            f"samples={samples}, keep={keep}, iterations={iterations}; give at least 1 each"
        )
    options = {
        "rewards": rewards,
        "threshold": threshold,
        "samples": samples,
        "keep": keep,
        "reward_weights": reward_weights,
        "iterations": iterations,
        "sft": sft,
    }
    with LoopRun(
        "rejection_sampling",
        model,
        tokenizer,
        folder,
        data={"prompts": prompts},
        options=options,
        seed=seed,
        batch_size=batch_size,
    ) as run:
        rows = prompt_rows(run.data["prompts"], "prompts")
        current: str | Path = run.start
        metrics: list[dict[str, Any]] = [
            {"iteration": 0, **run.measure("0-start", evaluate, current)}
        ]
        for iteration in range(1, iterations + 1):
            stage = f"{iteration}-rejection-sampling"
            asked = [row["prompt"] for row in rows]
            answers = draw(run, f"{stage}/sample", sampler, current, asked, samples)
            graded = grade(run, f"{stage}/grade", rewards, rows, answers, reward_weights)
            chosen = [kept(group, threshold, keep) for group in graded]
            training = [
                sft_row(row["prompt"], candidate.text)
                for row, group in zip(rows, chosen, strict=True)
                for candidate in group
            ]
            if not training:
                raise ValueError(
                    f"no answer of {sum(map(len, answers))} reached the reward of {threshold}; "
                    "lower threshold, raise samples, or begin with a better model"
                )
            current = run.train(stage, SFTTrainer, SFTConfig, sft or {}, current, training)
            metrics.append(
                {
                    "iteration": iteration,
                    **summary(graded),
                    "kept": len(training),
                    "solved": sum(map(bool, chosen)) / len(rows),
                    **run.trained(stage),
                    **run.measure(stage, evaluate, current),
                }
            )
        return run.result(current, metrics)


def kept(graded: Sequence[Candidate], threshold: float, keep: int) -> list[Candidate]:
    """The best `keep` of answers that are sorted best first, none below the threshold."""
    return [c for c in graded if c.reward is not None and c.reward >= threshold][:keep]


def summary(graded: Sequence[Sequence[Candidate]]) -> dict[str, float]:
    """How many answers were drawn, and their mean reward."""
    rewards = [c.reward for group in graded for c in group if c.reward is not None]
    found: dict[str, float] = {"sampled": sum(map(len, graded))}
    return found | ({"mean_reward": sum(rewards) / len(rewards)} if rewards else {})
