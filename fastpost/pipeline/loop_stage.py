"""A loop of `fastpost.loops` as a stage: its arguments from the fields of a file.

    {stage: rejection_sampling, prompts: problems.jsonl, rewards: maths, threshold: 1.0,
     sampler: {temperature: 1.0, max_tokens: 512}, sft: {max_steps: 100, lora_r: 16}}

Arguments keep their names; those that are objects in Python are written as what they are made of:
`sampler` (temperature, top_p, max_tokens, batch_size), `judge` (settings of one, or a file of
judges), `rewards` and `general_rewards` (names, as `fastpost grpo --reward`), `scorers` (as a
pipeline's evaluation) for `evaluate`, and `lora_r`, `lora_alpha` among a training's fields for
`peft_config`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import AutoTokenizer

from fastpost.chat_model.interface import Sampling
from fastpost.health.monitor import HealthMonitor
from fastpost.judges.judge_file import read_judge
from fastpost.loops import LOOPS
from fastpost.loops.run import watching
from fastpost.loops.samplers import local_sampler
from fastpost.pipeline.commands import write_json
from fastpost.pipeline.recipe import RecipeError
from fastpost.pipeline.scorers import Rewards, evaluate
from fastpost.report.record import RunRecorder

__all__ = ["arguments_of", "check_loop", "run_loop"]

_SAMPLER = ("temperature", "top_p", "max_tokens", "batch_size")
_OWN = {"tokenizer", "folder", "evaluate"}  # given by the pipeline, or written otherwise


def check_loop(kind: str, fields: Mapping[str, Any], where: str) -> None:
    """Whether the loop takes these fields.

    Raises:
        RecipeError: a field is unknown, or one the loop needs is missing.
    """
    parameters = inspect.signature(LOOPS[kind]).parameters
    known = set(parameters) - _OWN | ({"scorers"} if "evaluate" in parameters else set())
    unknown = sorted(set(fields) - known)
    needed = {name for name, p in parameters.items() if p.default is p.empty} - _OWN
    if parameters["evaluate"].default is inspect.Parameter.empty:
        needed.add("scorers")
    missing = sorted(needed - set(fields))
    if unknown or missing:
        raise RecipeError(
            f"{where}: {kind} takes {', '.join(sorted(known))}; unknown: "
            f"{', '.join(unknown) or 'none'}, missing: {', '.join(missing) or 'none'}"
        )


def run_loop(job: Mapping[str, Any], rewards: Rewards) -> None:
    """Run the loop of a job, or go on with it; `result.json` in its folder says what it chose."""
    given = dict(job)
    loop, folder = given.pop("loop"), Path(given.pop("folder"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    with watching(_record):
        result = LOOPS[loop](tokenizer=tokenizer, folder=folder, **arguments_of(given, rewards))
    write_json(
        folder / "result.json",
        {
            "checkpoint": str(result.checkpoint),
            "rows": {stage: str(path) for stage, path in result.rows.items()},
            "metrics": result.metrics,
        },
    )
    print(f"{loop} chose {result.checkpoint}", flush=True)


def _record(trainer: Any, stage: str, folder: Path) -> None:
    """Keep the curves of a training inside a loop."""
    trainer.add_callback(RunRecorder(trainer, HealthMonitor([]), stage, folder))


def arguments_of(given: Mapping[str, Any], rewards: Rewards) -> dict[str, Any]:
    """The loop's arguments from a stage's fields."""
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        if name == "sampler":
            arguments[name] = _sampler(value)
        elif name == "judge":
            arguments[name] = read_judge(value)
        elif name in ("rewards", "general_rewards"):
            arguments[name] = rewards(value)
        elif name == "scorers":
            arguments["evaluate"] = _grader(value, rewards)
        elif isinstance(value, Mapping):
            arguments[name] = _training(value)
        else:
            arguments[name] = value
    return arguments


def _sampler(given: Mapping[str, Any]) -> Any:
    unknown = sorted(set(given) - set(_SAMPLER))
    if unknown:
        raise RecipeError(f"sampler: unknown {', '.join(unknown)}. Known: {', '.join(_SAMPLER)}")
    sampling = {name: value for name, value in given.items() if name != "batch_size"}
    return local_sampler(Sampling(**sampling), batch_size=given.get("batch_size", 16))


def _training(given: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"report_to": "none", **given}
    rank, alpha = fields.pop("lora_r", None), fields.pop("lora_alpha", None)
    if rank is not None:
        fields["peft_config"] = LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    return fields


def _grader(scorers: Any, rewards: Rewards) -> Any:
    named = [
        {"name": s.get("name", s.get("task", s["scorer"])), "tolerance": 0, **s} for s in scorers
    ]

    def grade(folder: str) -> dict[str, float]:
        found = evaluate(folder, named, rewards=rewards, before=None)
        return {name: score["value"] for name, score in found.scores.items()}

    return grade
