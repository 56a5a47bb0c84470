"""Reward functions by name, as the commands of reinforcement learning take them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpost.cli.recipe import UsageError
from fastpost.cli.train import Job, RunFields

NAMES = {
    "maths": "answers equal to the column solution (math-verify)",
    "tags": "<think>...</think><answer>...</answer>",
    "code": "programs that pass the column tests, in a sandbox",
}


@dataclass(kw_only=True)
class RewardedRunFields(RunFields):
    """The fields of a run that is trained on rewards."""

    reward: str | list[str] = field(
        metadata={
            "help": "Reward, or a list of them: maths, tags, code, RULES.yaml, FILE.py:FUNCTION, "
            "or the folder or id of a reward model"
        }
    )


def reward_functions(given: str | list[str]) -> list[Any]:
    """What a trainer takes as `reward_funcs`.

    Args:
        given: names of `NAMES`, rule files, `FILE.py:FUNCTION`, or folders or ids of reward models.

    Raises:
        UsageError: the file or the function is not there, or a rule is wrong.
    """
    return [_reward(name) for name in ([given] if isinstance(given, str) else given)]


def rewards_of(job: Job) -> dict[str, Any]:
    """The trainer's argument `reward_funcs`, from a checked run."""
    return {"reward_funcs": reward_functions(job.fields.reward)}


def _reward(name: str) -> Any:
    if name == "maths":
        from fastpost.rewards.maths import maths_reward

        return maths_reward()
    if name == "tags":
        from fastpost.rewards.format import tags_reward

        return tags_reward()
    if name == "code":
        from fastpost.rewards.code import code_reward
        from fastpost.rewards.sandbox import Sandbox

        return code_reward(Sandbox())
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return _rules(Path(name).expanduser())
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _function(Path(file).expanduser(), function)
    return name


def _rules(file: Path) -> Any:
    from fastpost.rewards.rules import RulesReward

    if not file.is_file():
        raise UsageError(f"reward: there is no file {file}")
    try:
        return RulesReward.from_yaml(file)
    except ValueError as error:
        raise UsageError(f"reward: {error}") from error


def _function(file: Path, function: str) -> Any:
    if not file.is_file():
        raise UsageError(f"reward: there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"reward: {file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        names = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise UsageError(f"reward: {file} has no function {function}; it has {', '.join(names)}")
    return found


__all__ = ["NAMES", "RewardedRunFields", "reward_functions", "rewards_of"]
