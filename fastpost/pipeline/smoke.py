"""The same recipe on SmolLM2-135M and generated sums: every stage runs, two steps each, on a CPU.

What the recipe chooses stays (method, loss, adapter, optimizer, dtype, guards); what a small
machine cannot do (long rows, many rows at once, sharding, several GPUs) is made small, and rows
come from the demo's problems. It shows that the pipeline works, not what it teaches.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fastpost.data.row_files import json_line, whole_file
from fastpost.demo import tasks
from fastpost.demo.smollm2 import smollm2_path
from fastpost.pipeline.recipe import (
    DATA_KINDS,
    LOOP_KINDS,
    TRAINED_KINDS,
    Pipeline,
    Stage,
    references,
    stages_of,
)

__all__ = ["smoke"]

_ROWS, _STEPS, _AT_ONCE, _GROUP = 12, 2, 2, 2
_DROPPED = (
    "num_train_epochs", "fsdp", "fsdp_config", "use_vllm", "vllm_mode", "generation_batch_size",
    "steps_per_generation", "eval_dataset", "eval_strategy", "eval_steps", "dataset_split",
    "rollout_dtype", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size",
)  # fmt: skip
# Two answers of few tokens to a sum are wrong alike: without this nothing would be learnt, which
# the guards refuse.
_REWARD = '''"""A reward that differs from answer to answer: its different characters."""


def variety(completions, **columns):
    return [len(set(str(completion))) / 100 for completion in completions]
'''
_SAMPLING = ("grpo", "rloo", "ppo")
_PAIRS = ("dpo", "orpo", "cpo", "reward", "length_control")
Row = dict[str, Any]
_EXAM: dict[str, Any] = {
    "name": "chain_sum", "scorer": "reasoning_gym", "task": "chain_sum", "problems": 8,
    "max_new_tokens": 24, "tolerance": 0.5,
}  # fmt: skip
# A loop's data by the shape of its rows, and `rows`, whose shape depends on the loop.
_LOOP_ROWS = {
    "prompts": "prompts", "problems": "prompts", "general_prompts": "prompts", "probes": "prompts",
    "sft_rows": "sft", "cold_start": "sft", "general_rows": "sft",
}  # fmt: skip
_LOOP_ONCE = {
    "iterations": 1, "max_iterations": 1, "cycles": 1, "samples": 2, "keep": 1,
    "threshold": 0.0,
}  # fmt: skip
_DROPPED_OF_LOOPS = ("prompts_per_cycle", "batch_size", "min_margin", "reward_weights")


def smoke(pipeline: Pipeline) -> Pipeline:
    """The pipeline made small; its folder is `output_dir` with `-smoke` at the end."""
    folder = Path(pipeline.output_dir.rstrip("/") + "-smoke")
    rows = _Rows(folder / "rows")
    stages = tuple(_small(pipeline, stage, rows) for stage in pipeline.stages)
    model = str(smollm2_path())
    return dataclasses.replace(
        pipeline,
        model=model,
        output_dir=str(folder),
        gpus=None,
        stages=tuple(_with_model(stage, pipeline.model, model) for stage in stages),
        evaluation=_small_evaluation(pipeline),
    )


def _with_model(stage: Stage, old: str, new: str) -> Stage:
    fields = {name: new if value == old else value for name, value in stage.fields.items()}
    return dataclasses.replace(stage, fields=fields)


def _small_evaluation(pipeline: Pipeline) -> tuple[dict[str, Any], ...]:
    """One exam, whatever the recipe asks: its tolerance is what two steps cannot miss."""
    if not pipeline.evaluation:
        return ()
    return (_EXAM,)


def _small(pipeline: Pipeline, stage: Stage, rows: _Rows) -> Stage:
    fields = dict(stage.fields)
    shape = _shape_of(pipeline, stage)
    if stage.kind == "mix":
        sources = fields["sources"]
        fields["sources"] = {name: {"data": rows(shape)} for name in sources}
        fields |= {"rows": _ROWS}
        for name in ("model", "length_edges", "long_share"):
            fields.pop(name, None)
    elif stage.kind == "decontaminate":
        if not list(references(fields["train"])):
            fields["train"] = rows(shape)
        fields["against"] = [rows("texts", held_out=True)]
        fields.pop("columns", None)
        fields |= {"processes": 1}
    elif stage.kind in TRAINED_KINDS:
        fields = _small_training(stage.method, fields)
        if "reward" in fields:
            fields["reward"] = ["maths", rows.reward()]
        if not list(references(fields["dataset"])):
            fields["dataset"] = rows(shape)
    elif stage.kind == "constitutional":
        raise ValueError(
            f"stage {stage.name}: --smoke has no judge that tells short answers of a small model "
            "apart, so constitutional would have no pairs to train on; leave the stage out of it"
        )
    elif stage.kind in LOOP_KINDS:
        fields = _small_loop(stage.kind, fields, rows)
    return dataclasses.replace(stage, fields=fields)


def _small_loop(kind: str, fields: dict[str, Any], rows: _Rows) -> dict[str, Any]:
    """One iteration on few rows; what teaches is what the recipe says, who judges is at hand."""
    small = {name: value for name, value in fields.items() if name not in _DROPPED_OF_LOOPS}
    rewarded = fields.get("way") == "reward"
    shapes = _LOOP_ROWS | {"rows": "sft" if kind == "spin" else "prompts" if rewarded else "pairs"}
    of_length = "grpo" if rewarded else "dpo"
    for name, value in small.items():
        if name in shapes and isinstance(value, str) and not list(references(value)):
            small[name] = rows(shapes[name])
        elif name in ("rewards", "general_rewards"):
            small[name] = rows.reward()
        elif name == "judge":
            small[name] = {"model": str(smollm2_path()), "weighs_choices": True}
        elif name == "sampler":
            small[name] = {"temperature": 1.0, "max_tokens": 8, "batch_size": _ROWS}
        elif name == "scorers":
            small[name] = [{**_EXAM, "name": fields.get("metric", _EXAM["name"])}]
        elif name in _LOOP_ONCE:
            small[name] = _LOOP_ONCE[name]
        elif isinstance(value, dict):
            method = of_length if name == "training" else name.removeprefix("second_")
            small[name] = _small_training(method, value)
    return small


def _small_training(method: str, fields: dict[str, Any]) -> dict[str, Any]:
    small = {name: value for name, value in fields.items() if name not in _DROPPED}
    small |= {
        "max_steps": _STEPS,
        "per_device_train_batch_size": _AT_ONCE,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": _STEPS,
        "save_total_limit": 1,
        "use_cpu": not torch.cuda.is_available(),
    }
    if method in _SAMPLING:
        small |= {"num_generations": _GROUP, "max_completion_length": 24}
    elif method == "online_dpo":
        small |= {"max_new_tokens": 8, "max_length": 256}
    else:
        small["max_length"] = 256
    return small


def _small_rows(shape: str, seed: int, held_out: bool) -> list[Row]:
    if shape == "sft":
        return list(tasks.sft_rows(_ROWS, seed, held_out=held_out))
    entries = tasks.problems(_ROWS, seed, held_out=held_out)
    if (
        shape == "texts"
    ):  # without the system prompt, which all problems share; long enough to match
        solved = [f"{entry['question']} {tasks.solution(entry)}" for entry in entries]
        return [{"text": "\n".join(solved)}]
    if shape == "pairs":
        # an answer that is one off: wrong, and written as the right one is
        wrong = [tasks.solution(entry) + "1" for entry in entries]
        return list(tasks.preference_rows(entries, wrong))
    prompts = [row["prompt"] for row in tasks.sft_rows(_ROWS, seed, held_out=held_out)]
    if shape == "judged":
        return [
            {**row, "label": number % 2 == 0}
            for number, row in enumerate(tasks.sft_rows(_ROWS, seed, held_out=held_out))
        ]
    return [
        {"prompt": prompt, "solution": str(entry["answer"])}
        for prompt, entry in zip(prompts, entries, strict=True)
    ]


def _shape_of(pipeline: Pipeline, stage: Stage) -> str:
    """Which rows a stage reads: those of data stages are what their readers need."""
    if stage.kind in DATA_KINDS:
        readers = stages_of(pipeline, stage.name)
        return _shape_of(pipeline, readers[0]) if readers else "sft"
    if stage.method in _PAIRS:
        return "pairs"
    if stage.method == "kto":
        return "judged"
    return "prompts" if stage.method in _SAMPLING else "sft"


class _Rows:
    """Files of generated rows, each asked for with problems of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def reward(self) -> str:
        """A reward function in a file, as `reward` takes it."""
        path = self._folder / "variety.py"
        with whole_file(path) as file:
            file.write(_REWARD.encode())
        return f"{path}:variety"

    def __call__(self, shape: str, held_out: bool = False) -> str:
        self._count += 1
        path = self._folder / f"{shape}-{self._count}.jsonl"
        with whole_file(path) as file:
            file.writelines(map(json_line, _small_rows(shape, self._count, held_out)))
        return str(path)
