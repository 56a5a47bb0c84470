"""`fastpost run`: every stage of a recipe, from a base model to an assistant."""

from __future__ import annotations

import dataclasses
import importlib
import json
import typing
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpost.cli.plain_parser import PlainParser
from fastpost.cli.recipe import UsageError, convert, did_you_mean, load_yaml_file

if TYPE_CHECKING:
    from fastpost.pipeline.recipe import Pipeline, Stage

EPILOG = """A recipe:

  model: Qwen/Qwen3-32B
  output_dir: runs/assistant
  gpus: 8xH100-80GB
  evaluation:
    - {scorer: reasoning_gym, task: chain_sum, tolerance: 0.03}
  stages:
    - {stage: mix, name: rows, sources: {chat: chat.jsonl, maths: maths.jsonl}}
    - {stage: sft, dataset: stage:rows, learning_rate: 5.0e-6}
    - {stage: dpo, dataset: pairs.jsonl, lora_r: 64}
    - {stage: merge}

Stages: decontaminate, mix, the training commands, safety, evaluate, merge, export, and the loops.
Every other key of a stage is a field of its command. Run again after an interruption: finished
stages are skipped, the interrupted one goes on. docs/pipelines.md says more.

Exit code 1 where --plan finds a stage that does not fit, 3 where a score fell by more than its
tolerance."""

# Command -> its configuration in `fastpost`.
_CONFIGS = {
    "sft": "SFTConfig", "dpo": "DPOConfig", "kto": "KTOConfig", "orpo": "ORPOConfig",
    "cpo": "CPOConfig", "reward": "RewardConfig", "grpo": "GRPOConfig", "rloo": "RLOOConfig",
    "ppo": "PPOConfig",
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().read(argv)
    if args is None:
        return 0
    if args.work is not None:
        return _work(Path(args.work))
    if args.list:
        print("\n".join(bundled_recipes()))
        return 0
    if args.recipe is None:
        raise UsageError("name a recipe; --list shows the bundled ones")
    if args.plan and args.smoke:
        raise UsageError("--plan is of the recipe as it stands, --smoke of a small one: give one")
    pipeline = read_pipeline(args.recipe)
    if args.output_dir is not None:
        pipeline = dataclasses.replace(pipeline, output_dir=args.output_dir)
    return _plan(pipeline, args.json) if args.plan else _run(pipeline, args.smoke)


def bundled_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("fastpost").joinpath("recipes")
    return sorted(f.name for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_pipeline(recipe: str) -> Pipeline:
    """A recipe's file, or a bundled recipe by name, with every field of every stage checked.

    Raises:
        UsageError: the first mistake found.
    """
    from fastpost.pipeline.recipe import Pipeline, RecipeError

    path = Path(recipe).expanduser()
    bundled = recipe if recipe.endswith(".yaml") else recipe + ".yaml"
    if not path.exists() and bundled in bundled_recipes():
        path = Path(str(resources.files("fastpost").joinpath("recipes", bundled)))
    try:
        pipeline = Pipeline.read(load_yaml_file(path), str(path))
        checked = [_checked(stage, str(path)) for stage in pipeline.stages]
    except RecipeError as error:
        raise UsageError(str(error)) from error
    return dataclasses.replace(pipeline, stages=tuple(checked))


def _checked(stage: Stage, path: str) -> Stage:
    """The stage with its fields converted as its command would convert them."""
    from fastpost.pipeline.recipe import LOOP_KINDS

    where = f"{path}: stage {stage.name}"
    if stage.kind in LOOP_KINDS:
        from fastpost.pipeline.loop_stage import check_loop  # heavy

        check_loop(stage.kind, stage.fields, where)
    if stage.method not in _CONFIGS:
        return stage
    hints = _hints(stage.method)
    fields = {}
    for name, value in stage.fields.items():
        if name not in hints:
            raise UsageError(
                f"{where}: fastpost {stage.method} has no field {name!r}."
                + did_you_mean(name, hints)
            )
        try:
            fields[name] = convert(value, hints[name])
        except ValueError as error:
            raise UsageError(f"{where}: {name}: {error}") from None
    if "dataset" not in fields:
        raise UsageError(f"{where}: dataset is missing")
    return dataclasses.replace(stage, fields=fields)


def _hints(method: str) -> dict[str, Any]:
    import fastpost  # the configurations bring torch and TRL

    run_fields = importlib.import_module(f"fastpost.cli.{method}").COMMAND.run_fields
    config = getattr(fastpost, _CONFIGS[method])
    hints = typing.get_type_hints(run_fields) | typing.get_type_hints(config)
    names = [f.name for cls in (run_fields, config) for f in dataclasses.fields(cls) if f.init]
    return {name: hints[name] for name in names}


def _plan(pipeline: Pipeline, as_json: bool) -> int:
    from fastpost.pipeline.commands import write_json
    from fastpost.pipeline.planned import plan_stages, text_of

    try:
        plans = plan_stages(pipeline)
    except ValueError as error:
        raise UsageError(str(error)) from error
    found = [one.as_dict() for one in plans]
    write_json(Path(pipeline.output_dir).expanduser() / "plan.json", found)
    print(json.dumps(found, indent=2) if as_json else text_of(plans))
    return int(any(one.plan is not None and not one.plan.fits for one in plans))


def _run(pipeline: Pipeline, is_smoke: bool) -> int:
    from fastpost.pipeline.runner import Regression, Run, StageFailed

    try:
        if is_smoke:
            from fastpost.pipeline.smoke import smoke

            pipeline = smoke(pipeline)
        run = Run(pipeline, is_smoke=is_smoke, say=_say)
        run.run()
    except Regression as fallen:
        print(f"fastpost run: stopped: {fallen}", flush=True)
        return 3
    except (StageFailed, ValueError) as error:
        raise UsageError(str(error)) from error
    print(f"done: {run.folder}; fastpost report {run.folder} shows it")
    return 0


def _work(path: Path) -> int:
    from fastpost.cli.rewards import reward_functions
    from fastpost.pipeline.work import do_job

    try:
        do_job(path, reward_functions)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> PlainParser:
    parser = PlainParser("run", "Runs every stage of a recipe, or what is left of it.", EPILOG)
    add = parser.add_argument
    add("recipe", metavar="RECIPE", nargs="?", help="YAML file, or the name of a bundled one")
    add("--plan", action="store_true", help="predicts every stage's memory and cost, runs nothing")
    add("--smoke", action="store_true", help="runs it all, small, on SmolLM2 and generated rows")
    add("--output-dir", metavar="DIR", help="instead of the recipe's output_dir")
    add("--json", action="store_true", help="prints the plan as JSON")
    add("--list", action="store_true", help="names the bundled recipes")
    add("--work", metavar="JOB", help="one stage's job; the pipeline's own")
    return parser
