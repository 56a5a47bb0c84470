"""Self-play fine-tuning, SPIN (Chen 2024, arXiv 2401.01335, algorithm 1, eq. 4.7).

    y' ~ π_t(y | x)          the opponent: what the previous iterate answers
    π_{t+1} = argmin  −log σ(β [log π(y|x)/π_t(y|x) − log π(y'|x)/π_t(y'|x)])

The answers y of the data are preferred to the model's own, with the previous iterate as reference:
DPO's loss. At the fixed point the model's answers cannot be told from the data. A row is
`{"prompt": [messages], "completion": "4"}`, the completion as text or messages.

The loop stops when the held-out score has not risen by `min_gain` for `patience` iterations (it
gives the best iterate, not the last), or when every answer of the model is the data's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpost.loops.candidates import answer, draw, preference_row
from fastpost.loops.run import Evaluate, Fields, LoopResult, LoopRun, Sampler, prompt_rows
from fastpost.trainers.dpo import DPOConfig, DPOTrainer

__all__ = ["spin"]


def spin(
    model: Any,
    tokenizer: Any,
    rows: Any,
    folder: str | Path,
    *,
    sampler: Sampler,
    evaluate: Evaluate,
    metric: str,
    max_iterations: int = 4,
    min_gain: float = 0.0,
    patience: int = 1,
    dpo: Fields | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> LoopResult:
    """Run the loop, or go on with it.

    Args:
        model, tokenizer, folder, seed, batch_size: see `LoopRun`.
        rows: prompts and the answers to play for, see above.
        sampler: makes a chat model of a model folder.
        evaluate: grades a model folder on held-out rows, before the first iteration and after each.
        metric: which of its scores is to rise.
        max_iterations: iterations at most.
        min_gain: a rise of the score that is not more than this is none.
        patience: iterations without a rise after which the loop stops.
        dpo: fields of `DPOConfig`; the reference is the previous iterate.

    Returns:
        The iterate with the best score; metrics of an iteration: `iteration`, `pairs`, `equal`
        (rows whose answer the opponent gave itself), the trainer's and `evaluate`'s figures, and in
        the last entry `stopped`. Entry 0 is the model at the start.

    Raises:
        ValueError: an option out of range, or `evaluate` gives no `metric`.
        DataError: see `LoopRun`.
    """
    if max_iterations < 1 or patience < 1 or min_gain < 0:
        raise ValueError(
            f"max_iterations={max_iterations}, patience={patience}, min_gain={min_gain}; give at "
            "least 1, 1 and 0"
        )
    if (dpo or {}).get("reference") is not None:
        raise ValueError("dpo.reference is set; SPIN's reference is the previous iterate")
    options = {
        "metric": metric,
        "max_iterations": max_iterations,
        "min_gain": min_gain,
        "patience": patience,
        "dpo": dpo,
    }
    with LoopRun(
        "spin",
        model,
        tokenizer,
        folder,
        data={"rows": rows},
        options=options,
        seed=seed,
        batch_size=batch_size,
    ) as run:
        data = prompt_rows(run.data["rows"], "rows", "completion")
        prompts = [row["prompt"] for row in data]
        current: str | Path = run.start
        scores = run.measure("0-start", evaluate, current)
        best, best_score, stale = current, _score(scores, metric), 0
        metrics: list[dict[str, Any]] = [{"iteration": 0, **scores}]
        for iteration in range(1, max_iterations + 1):
            stage = f"{iteration}-spin"
            own = draw(run, f"{stage}/sample", sampler, current, prompts, 1)
            pairs = [
                preference_row(row["prompt"], answer(row, "completion"), texts[0])
                for row, texts in zip(data, own, strict=True)
                if texts and texts[0].strip() != answer(row, "completion").strip()
            ]
            entry: dict[str, Any] = {
                "iteration": iteration,
                "pairs": len(pairs),
                "equal": sum(map(bool, own)) - len(pairs),
            }
            metrics.append(entry)
            if not pairs:
                entry["stopped"] = "the opponent's answers are the data's"
                break
            # No second model is named: the trainer's reference is the policy as it begins.
            current = run.train(stage, DPOTrainer, DPOConfig, dpo or {}, current, pairs)
            scores = run.measure(stage, evaluate, current)
            entry |= run.trained(stage) | scores
            score = _score(scores, metric)
            stale = 0 if score > best_score + min_gain else stale + 1
            if score > best_score:
                best, best_score = current, score
            if stale == patience:
                entry["stopped"] = f"{metric} has not risen for {patience} iterations"
                break
        else:
            metrics[-1]["stopped"] = f"max_iterations={max_iterations}"
        return run.result(best, metrics)


def _score(scores: dict[str, float], metric: str) -> float:
    if metric not in scores:
        raise ValueError(f"evaluate gave {sorted(scores)}, and no metric {metric!r}")
    return scores[metric]
