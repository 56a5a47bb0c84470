"""The trusted end: runs the tests in a jail of its own and calls the program through a pipe.

The verdict leaves on a descriptor that only this process holds; the program is in another PID
namespace, cannot see this memory, and never learns what the tests expect. It can therefore not
forge success by `os._exit(0)`, by printing, by redefining `__eq__`, `abs` or `AssertionError`, or
by reading the expected answers off the stack.

What tests can say: calls with plain data, attributes and methods of returned objects, iteration,
`len`, indexing, built-in exceptions. `isinstance` against a class of the program cannot work.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from . import wire


class _Unsendable(TypeError):
    """The test passes something to the program that cannot cross the pipe."""


class RemoteError(Exception):
    """The program raised an exception of its own class, or stopped answering."""


class _Program:
    """The other end of the pipe."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self.requests, self.replies = requests, replies
        self.needs_unsendable = False

    def handle_of(self, value: Any) -> int:
        if type(value) is _Handle:
            return object.__getattribute__(value, "_number")
        self.needs_unsendable = True
        raise _Unsendable(f"a {type(value).__name__} cannot be passed to the program")

    def object_of(self, number: int) -> Any:
        return _Handle(self, number)

    def receive(self) -> dict[str, Any]:
        reply = wire.receive(self.replies)
        if not isinstance(reply, dict):
            raise RemoteError("the program stopped answering")
        if "error" in reply:
            self._raise(*reply["error"])
        return reply

    def _raise(self, name: str, message: str) -> NoReturn:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError:
            raise kind(message)
        raise RemoteError(f"{name}: {message}")

    def call(
        self, number: int, attribute: str | None, arguments: list[Any], keywords: dict[str, Any]
    ) -> Any:
        encoded = wire.encode(arguments, self.handle_of)
        named = wire.encode(keywords, self.handle_of)
        wire.send(self.requests, [number, attribute, encoded, named])
        reply = self.receive()
        for ours, theirs in zip(
            arguments, wire.decode(reply["arguments"], self.object_of), strict=True
        ):
            _copy_changes(ours, theirs)
        return wire.decode(reply["value"], self.object_of)

    def attribute(self, number: int, name: str) -> Any:
        wire.send(self.requests, [number, name, None, None])
        return wire.decode(self.receive()["value"], self.object_of)


def _copy_changes(ours: Any, theirs: Any) -> None:
    """Repeats on the test's own object what the program did to its copy."""
    if type(ours) is not type(theirs) or ours == theirs:
        return
    if type(ours) in (list, bytearray):
        ours[:] = theirs
    elif type(ours) in (dict, set):
        ours.clear()
        ours.update(theirs)


class _Handle:
    """An object that lives in the program's process. Equal only to itself, whatever it says."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: _Program, number: int) -> None:
        self._program, self._number = program, number

    def _method(self, name: str, *arguments: Any) -> Any:
        return self._program.call(self._number, name, list(arguments), {})

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._program.call(self._number, None, list(arguments), keywords)

    def __getattr__(self, name: str) -> Any:
        return self._program.attribute(self._number, name)

    def __len__(self) -> int:
        try:
            return self._method("__len__")
        except AttributeError as error:  # what `list` expects of an object without a length
            raise TypeError(str(error)) from error

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._method("__getitem__", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._method("__setitem__", key, value)

    def __contains__(self, key: Any) -> bool:
        return self._method("__contains__", key)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._method("__iter__")
        try:
            while True:
                yield self._program.call(iterator._number, "__next__", [], {})
        except StopIteration:
            return

    def __str__(self) -> str:
        return self._method("__str__")

    def __eq__(self, other: object) -> bool:
        return type(other) is _Handle and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)


def _namespace(program: _Program) -> dict[str, Any]:
    """The program's globals as a test sees them; none may hide a built-in or a standard module."""
    greeting = program.receive()
    names = {}
    for name, value in greeting["names"].items():
        if name not in vars(builtins) and name not in sys.stdlib_module_names:
            names[name] = wire.decode(value, program.object_of)
    for name, module in greeting["modules"].items():
        if module in sys.stdlib_module_names and name not in vars(builtins):
            names[name] = importlib.import_module(module)
    return names


def run_tests(
    tests: list[str], entry_point: str | None, requests: int, replies: int, verdict: int
) -> None:
    """Runs each test; writes `{"passed": [...], "reasons": [...]}` to `verdict`.

    `passed` holds True, False, or None for a test that cannot be run at all. With `entry_point`,
    each test must define `check(candidate)`, which is then called (HumanEval's form).
    """
    passed: list[bool | None] = []
    reasons: list[str] = []
    with open(requests, "wb") as outgoing, open(replies, "rb") as incoming:
        program = _Program(outgoing, incoming)
        try:
            names = _namespace(program)
        except Exception as error:
            reason = f"program did not load: {type(error).__name__}: {error}"
            passed, reasons = [False] * len(tests), [reason] * len(tests)
            tests = []
        for test in tests:
            outcome, reason = _run_test(test, entry_point, dict(names), program)
            passed.append(outcome)
            reasons.append(reason)
        os.write(verdict, json.dumps({"passed": passed, "reasons": reasons}).encode())


def _run_test(
    test: str, entry_point: str | None, names: dict[str, Any], program: _Program
) -> tuple[bool | None, str]:
    program.needs_unsendable = False
    try:
        code = compile(test, "test.py", "exec")
    except (SyntaxError, ValueError) as error:
        return None, f"the test does not compile: {error}"
    try:
        if entry_point is not None:
            names.pop("check", None)  # the test's own, never the program's
        exec(code, names)
        if entry_point is not None:
            names["check"](names[entry_point])
    except BaseException as error:  # a test that exits has not passed
        if program.needs_unsendable:
            return None, f"the test cannot be run here: {error}"
        return False, f"{type(error).__name__}: {error}"[:500]
    return True, "passed"
