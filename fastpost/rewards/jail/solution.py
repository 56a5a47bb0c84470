"""The untrusted end: loads a model's program and answers calls to it.

Nothing here is trusted by anybody. The program shares this process and may rewrite all of it; all
that it can gain is to choose what its own functions return, which it could do anyway.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from . import wire


def _execute(source: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, "program.py", "exec"), module.__dict__)
    return module


def run_program(source: str) -> None:
    """Runs `source` as a script; its exit status is the process's."""
    _execute(source, "__main__")


class _Objects:
    """Numbers for the objects that stay on this side."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def handle_of(self, value: Any) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]

    def object_of(self, number: int) -> Any:
        return self.objects[number]


def _answer(request: Any, objects: _Objects) -> dict[str, Any]:
    number, attribute, arguments, keywords = request
    try:
        target = objects.object_of(number)
        if attribute is not None:
            target = getattr(target, attribute)
        if arguments is None:
            return {"value": wire.encode(target, objects.handle_of)}
        positional = wire.decode(arguments, objects.object_of)
        named = wire.decode(keywords, objects.object_of)
        value = wire.encode(target(*positional, **named), objects.handle_of)
        # The arguments go back too: a test may look at what the function did to its list.
        return {"value": value, "arguments": wire.encode(positional, objects.handle_of)}
    except Exception as error:
        return {"error": [type(error).__name__, str(error)[:500]]}


def serve(source: str, requests: int, replies: int) -> None:
    """Loads `source`, names its globals, then answers one call a line until the pipe closes."""
    objects = _Objects()
    # Unbuffered writes and reads through files that the program cannot reach by closing 0-2.
    with open(requests, "rb") as incoming, open(replies, "wb") as outgoing:
        try:
            module = _execute(source, "solution")
        except Exception as error:
            wire.send(outgoing, {"error": [type(error).__name__, str(error)[:500]]})
            return
        names, modules = {}, {}
        for name, value in list(vars(module).items()):
            if name.startswith("__"):
                continue
            if isinstance(value, types.ModuleType):
                modules[name] = value.__name__
            else:
                names[name] = wire.encode(value, objects.handle_of)
        wire.send(outgoing, {"names": names, "modules": modules})
        while (request := wire.receive(incoming)) is not None:
            wire.send(outgoing, _answer(request, objects))
