"""The R1 recipe (DeepSeek-AI 2025, arXiv 2501.12948, section 2.3).

    1  cold start            SFT of the base model on a few long reasoned answers
    2  reasoning RL          GRPO on problems whose answers rules can check
    3  rejection sampling    answers of (2) that reach `threshold`, and general rows: SFT of the
                             *base* model once more
    4  RL for all scenarios  GRPO on problems and general prompts together, each kind with its own
                             rewards

Problems and general prompts are rows `{"prompt": [messages], ...}` whose other columns reach the
rewards of their kind; SFT rows have `prompt` and `completion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpost.data.rows import Row
from fastpost.loops.candidates import Reward, draw, grade, sft_row, supervised_rows
from fastpost.loops.rejection_sampling import kept, summary
from fastpost.loops.run import Evaluate, Fields, LoopResult, LoopRun, Sampler, prompt_rows
from fastpost.trainers.grpo import GRPOConfig, GRPOTrainer
from fastpost.trainers.sft import SFTConfig, SFTTrainer

__all__ = ["r1"]

_KIND = "kind"  # column of stage 4: which rewards speak of a row
_SAMPLING = "3-rejection-sampling"
_REASONING, _GENERAL = "reasoning", "general"


def r1(
    model: Any,
    tokenizer: Any,
    cold_start: Any,
    problems: Any,
    rewards: Reward | Sequence[Reward],
    folder: str | Path,
    *,
    sampler: Sampler,
    threshold: float,
    samples: int = 4,
    keep: int = 1,
    general_rows: Any = None,
    general_prompts: Any = None,
    general_rewards: Reward | Sequence[Reward] | None = None,
    sft: Fields | None = None,
    grpo: Fields | None = None,
    second_sft: Fields | None = None,
    second_grpo: Fields | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> LoopResult:
    """Run the recipe, or go on with it.

    Args:
        model, tokenizer, folder, seed, batch_size: see `LoopRun`.
        cold_start: SFT rows of stage 1.
        problems: prompts of stages 2 to 4.
        rewards: of problems, functions in TRL's form, summed.
        sampler: makes a chat model of a model folder; its temperature must be above 0.
        threshold, samples, keep: of `samples` answers to a problem in stage 3 at most `keep` stay,
            the best that reach `threshold`.
        general_rows: SFT rows beside those of stage 3.
        general_prompts, general_rewards: prompts beside the problems of stage 4, and their rewards.
        sft, grpo: fields of `SFTConfig` and `GRPOConfig`.
        second_sft, second_grpo: of stages 3 and 4; None takes those of 1 and 2.
        evaluate: grades a model folder at the start and after each stage.

    Returns:
        The last model; five entries of metrics: `iteration` (0 to 4), `stage`, `rows` trained on,
        the trainer's and `evaluate`'s figures, of stage 3 also `sampled`, `mean_reward`, `kept`.

    Raises:
        ValueError: an option out of range, general prompts without rewards, nothing kept.
        DataError: see `LoopRun`.
    """
    _require_options(samples, keep, general_prompts, general_rewards)
    options: dict[str, Any] = {"rewards": rewards, "threshold": threshold}
    options |= {"samples": samples, "keep": keep, "general_rewards": general_rewards}
    options |= {"sft": sft, "grpo": grpo, "second_sft": second_sft, "second_grpo": second_grpo}
    data = {
        "cold_start": cold_start,
        "problems": problems,
        "general_rows": general_rows,
        "general_prompts": general_prompts,
    }
    with LoopRun(
        "r1", model, tokenizer, folder, data=data, options=options, seed=seed, batch_size=batch_size
    ) as run:
        problem_rows = prompt_rows(run.data["problems"], "problems")
        general = prompt_rows(run.data.get("general_prompts", []), "general_prompts")
        metrics: list[dict[str, Any]] = [
            {"iteration": 0, "stage": "start", **run.measure("0-start", evaluate, run.start)}
        ]

        def finish(stage: str, checkpoint: Path, rows: Sequence[Row], **more: Any) -> Path:
            entry = {"iteration": len(metrics), "stage": stage, "rows": len(rows)}
            figures = run.trained(stage) | run.measure(stage, evaluate, checkpoint)
            metrics.append(entry | more | figures)
            return checkpoint

        def supervise(stage: str, fields: Fields | None, rows: Sequence[Row], **more: Any) -> Path:
            made = run.train(stage, SFTTrainer, SFTConfig, fields or {}, run.start, rows)
            return finish(stage, made, rows, **more)

        def reinforce(
            stage: str, fields: Fields | None, start: Path, rows: Sequence[Row], functions: Any
        ) -> Path:
            made = run.train(
                stage, GRPOTrainer, GRPOConfig, fields or {}, start, rows, reward_funcs=functions
            )
            return finish(stage, made, rows)

        begun = supervise("1-cold-start", sft, supervised_rows(run, "cold_start"))
        reasoner = reinforce("2-reasoning-rl", grpo, begun, problem_rows, _as_list(rewards))

        chosen, drawn = _sampled(
            run, sampler, reasoner, problem_rows, rewards, threshold, samples, keep
        )
        second = chosen + supervised_rows(run, "general_rows")
        taught = supervise(_SAMPLING, second_sft or sft, second, **drawn, kept=len(chosen))

        mixed = _mixed(problem_rows, general)
        functions = [_Only(_REASONING, function) for function in _as_list(rewards)]
        functions += [_Only(_GENERAL, function) for function in _as_list(general_rewards)]
        last = reinforce("4-mixed-rl", second_grpo or grpo, taught, mixed, functions)
        return run.result(last, metrics)


def _require_options(samples: int, keep: int, prompts: Any, rewards: Any) -> None:
    if min(samples, keep) < 1:
        raise ValueError(f"samples={samples}, keep={keep}; give at least 1 each")
    if (prompts is None) != (rewards is None):
        raise ValueError("general_prompts and general_rewards go together; give both or neither")


def _sampled(
    run: LoopRun,
    sampler: Sampler,
    model: Path,
    rows: Sequence[Row],
    rewards: Reward | Sequence[Reward],
    threshold: float,
    samples: int,
    keep: int,
) -> tuple[list[Row], dict[str, float]]:
    """SFT rows of the best answers to problems, and figures of all that were drawn."""
    asked = [row["prompt"] for row in rows]
    answers = draw(run, f"{_SAMPLING}/sample", sampler, model, asked, samples)
    graded = grade(run, f"{_SAMPLING}/grade", rewards, rows, answers)
    chosen = [
        sft_row(row["prompt"], candidate.text)
        for row, group in zip(rows, graded, strict=True)
        for candidate in kept(group, threshold, keep)
    ]
    if not chosen:
        raise ValueError(
            f"no answer of {sum(map(len, answers))} reached the reward of {threshold} in stage 3; "
            "lower threshold, raise samples, or train longer in stage 2"
        )
    return chosen, summary(graded)


class _Only:
    """A reward that has no opinion on rows of the other kind."""

    def __init__(self, kind: str, function: Reward) -> None:
        self._kind, self._function = kind, function
        self.__name__ = f"{kind}_{getattr(function, '__name__', type(function).__name__)}"

    def __call__(
        self, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[float | None]:
        own = [i for i, kind in enumerate(columns[_KIND]) if kind == self._kind]
        values: list[float | None] = [None] * len(completions)
        if not own:
            return values
        picked = {
            name: [column[i] for i in own] if isinstance(column, list) else column
            for name, column in columns.items()
            if name != _KIND
        }
        said = self._function(
            prompts=[prompts[i] for i in own], completions=[completions[i] for i in own], **picked
        )
        for i, value in zip(own, said, strict=True):
            values[i] = value
        return values


def _mixed(problems: Sequence[Row], general: Sequence[Row]) -> list[Row]:
    """Both kinds with every column of either, None where a row has no such column."""
    marked = [row | {_KIND: _REASONING} for row in problems]
    marked += [row | {_KIND: _GENERAL} for row in general]
    names = dict.fromkeys(name for row in marked for name in row)
    return [{name: row.get(name) for name in names} for row in marked]


def _as_list(functions: Any) -> list[Reward]:
    if functions is None:
        return []
    return [functions] if callable(functions) else list(functions)
