"""Reward for programs: the share of tests that a completion's Python passes in the sandbox.

A row's tests are a list of either
- strings of Python that raise on failure (`assert add(1, 2) == 3`; with `entry_point_column`,
  HumanEval's `def check(candidate)`), run in a jail apart from the program's, or
- dicts `{"input": ..., "output": ...}`: standard input, and the standard output expected of it,
  compared here without trailing white space, where the program cannot see it.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .completion import Completion, Reward, column, completion_text
from .sandbox import Sandbox

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def extract_program(text: str) -> str | None:
    """The last fenced Python block of `text`, None without one."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def _standard(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _outcomes(
    sandbox: Sandbox, program: str, tests: list[Any], entry_point: str | None
) -> list[bool | None]:
    if all(isinstance(test, str) for test in tests):
        return sandbox.check(program, tests, entry_point).passed
    outcomes: list[bool | None] = []
    for test in tests:
        result = sandbox.run(program, stdin=test["input"])
        clean = result.exit_code == 0 and result.killed_for is None
        outcomes.append(clean and _standard(result.stdout) == _standard(test["output"]))
    return outcomes


def _is_runnable(tests: Any) -> bool:
    if not isinstance(tests, list) or not tests:
        return False
    return all(isinstance(test, str) for test in tests) or all(
        isinstance(test, dict)
        and isinstance(test.get("input"), str)
        and isinstance(test.get("output"), str)
        for test in tests
    )


def code_reward(
    sandbox: Sandbox,
    *,
    tests_column: str = "tests",
    entry_point_column: str | None = None,
    is_partial: bool = False,
    workers: int = 2,
) -> Reward:
    """Builds the reward: 1.0 if all tests pass, else 0.0; with `is_partial`, the share that pass.

    A completion without a fenced program earns 0.0. A row is None where its tests are absent,
    malformed or cannot be run. `workers` programs run at a time.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; give at least 1")

    def score(completion: Completion, tests: Any, entry_point: str | None) -> float | None:
        tests = [tests] if isinstance(tests, str) else tests
        if not _is_runnable(tests):
            return None
        program = extract_program(completion_text(completion))
        if program is None:
            return 0.0
        outcomes = _outcomes(sandbox, program, tests, entry_point)
        if None in outcomes:
            return None
        share = sum(map(bool, outcomes)) / len(outcomes)
        return share if is_partial else float(share == 1.0)

    def reward(
        prompts: list[Any], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        tests = column(tests_column, columns, len(completions))
        entry_points = (
            column(entry_point_column, columns, len(completions))
            if entry_point_column
            else [None] * len(completions)
        )
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(score, completions, tests, entry_points))

    reward.__name__ = "code_reward"
    return reward
