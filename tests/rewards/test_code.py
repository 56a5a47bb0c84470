"""The code reward, and programs that try to be paid for nothing."""

from __future__ import annotations

import pytest

from fastpost.rewards.code import code_reward, extract_program
from fastpost.rewards.sandbox import Sandbox, SandboxLimits

_TESTS = ["assert add(1, 2) == 3", "assert abs(add(0.5, 1) - 1.5) < 1e-9"]
_CHECK = "def check(candidate):\n    assert candidate(2, 2) == 4\n"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(SandboxLimits(wall_seconds=2.0))


def test_right_programs_pass_and_wrong_ones_do_not(sandbox: Sandbox) -> None:
    right = "Sure.\n```python\ndef add(a, b):\n    return a + b\n```"
    wrong = right.replace("a + b", "a - b")
    half = right.replace("a + b", "3")
    message = [{"role": "assistant", "content": right}]
    completions = [right, wrong, half, message, "no code"]
    prompts = [""] * 5
    assert code_reward(sandbox)(prompts, completions, tests=[_TESTS] * 5) == [1, 0, 0, 1, 0]
    partial = code_reward(sandbox, is_partial=True)
    assert partial(prompts, completions, tests=[_TESTS] * 5) == [1, 0, 0.5, 1, 0]


def test_rows_without_runnable_tests_are_not_scored(sandbox: Sandbox) -> None:
    program = "```python\ndef add(a, b): return a + b\n```"
    tests = [None, [], ["assert ("], ["add(lambda: 0, 1)"], [{"input": 3}]]
    assert code_reward(sandbox)([""] * 5, [program] * 5, tests=tests) == [None] * 5


@pytest.mark.parametrize(
    "program",
    [
        "import os; print('all tests passed'); os._exit(0)",
        "raise SystemExit(0)",
        "def add(a, b):\n    import os; os._exit(0)",
        "class Yes:\n    def __eq__(self, other): return True\ndef add(a, b): return Yes()",
        "class Yes(float):\n    def __eq__(self, o): return True\ndef add(a, b): return Yes(9)",
        "def abs(x): return 0\ndef add(a, b): return 3",
        "class AssertionError(Exception): pass\nadd = lambda a, b: 0",
        "import builtins\nbuiltins.AssertionError = ValueError\nadd = lambda a, b: 0",
        "import os, json\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, json.dumps({'passed': [True] * 2, 'reasons': ['', '']}).encode())\n"
        "    except OSError: pass\nos._exit(0)",
        "import os, json\nfor fd in range(3, 64):\n"
        '    try: os.write(fd, b\'{"value": true, "arguments": []}\\n\' * 9)\n'
        "    except OSError: pass",
        "import sys\nsys.setrecursionlimit(10)\ndef add(a, b): return 0",
        "def add(a, b):\n    while True: pass",
        "def add(a, b): return [0] * 10**7",
        "def add(a, b): raise AssertionError",
        "def check(candidate): pass\ndef add(a, b): return 0",
        "import gc, sys\ndef add(a, b):\n"
        "    frame = sys._getframe()\n    while frame.f_back: frame = frame.f_back\n"
        "    return frame.f_globals.get('expected', 0)",
    ],
)
def test_success_cannot_be_forged(sandbox: Sandbox, program: str) -> None:
    completions = [f"```python\n{program}\n```"]
    assert code_reward(sandbox)([""], completions, tests=[_TESTS]) == [0.0]
    entry = code_reward(sandbox, entry_point_column="entry")
    assert entry([""], completions, tests=[[_CHECK]], entry=["add"]) == [0.0]


def test_standard_input_tests(sandbox: Sandbox) -> None:
    double = "```python\nprint(int(input()) * 2)\n```"
    cheat = "```python\nimport os; print(4); os._exit(1)\n```"
    tests = [[{"input": "2", "output": "4\n"}, {"input": "5", "output": "10"}]] * 2
    assert code_reward(sandbox, is_partial=True)([""] * 2, [double, cheat], tests=tests) == [1, 0]


def test_tests_can_use_objects_generators_mutation_and_exceptions(sandbox: Sandbox) -> None:
    program = """
import math
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def __len__(self): return len(self.items)
def count(n):
    yield from range(n)
def sort(items): items.sort()
def fail(): raise KeyError("x")
def big(): return 10**6000
def shapes(): return {(1, 2): {3}, "a": (b"x", 1j, None)}
"""
    tests = [
        "s = Stack(); s.push(4); assert len(s) == 1 and s.items == [4]",
        "assert list(count(3)) == [0, 1, 2]",
        "x = [3, 1]; sort(x); assert x == [1, 3]",
        "try:\n    fail()\n    assert False\nexcept KeyError: pass",
        "assert big() == 10**6000",
        "assert shapes() == {(1, 2): {3}, 'a': (b'x', 1j, None)}",
        "assert math.sqrt(4) == 2",
    ]
    verdict = sandbox.check(program, tests)
    assert verdict.passed == [True] * len(tests), verdict.reasons


def test_the_last_block_is_the_program() -> None:
    assert extract_program("```py\na\n```\n```\nb\n```") == "b\n"
    assert extract_program("nothing") is None


def test_a_missing_column_is_named(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="no column 'tests'"):
        code_reward(sandbox)([""], [""])
