"""Triton's intermediate representation as a tree of operations, read from its text.

`compiled.asm["ttir"]` is one function, everything inlined, one operation a line. A region is the
body of a loop or of a branch; it is a list of operations, one of which may open the next block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["Operation", "element_type", "parse"]

VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
ASSIGNMENT = re.compile(r'((?:%[\w$.:-]+(?:, )?)+) = (?=["\w])')
NAME = re.compile(r'"?([\w.]+)"?')
ARGUMENT = re.compile(r"(%[\w$.-]+): ((?:[^,{()]|\([^)]*\))+)")
FILE_LINE = re.compile(r'^(#loc\d*) = loc\("([^"]+)":(\d+):\d+\)', re.MULTILINE)
ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
REFERENCE = re.compile(r"#loc\d*")


@dataclass
class Operation:
    """One operation: `name` of `operands`, giving `results`.

    `text` is its line without its place; `arguments` are (name, type) of a function or of a block.
    """

    name: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    text: str
    place: str
    arguments: tuple[tuple[str, str], ...] = ()
    regions: list[list[Operation]] = field(default_factory=list)

    @property
    def type(self) -> str:
        """As it is written last: of the result, or of what is stored."""
        return re.split(r" : | -> | to ", self.text.rstrip("{ "))[-1].strip("() ")


def element_type(text: str) -> str:
    """Of one element: tensor<64x1xi64> is i64, tensor<64x!tt.ptr<bf16>> is ptr."""
    if "!tt." in text:
        return "ptr"
    return text.rpartition("x")[2].rstrip(">") if text.startswith("tensor<") else text


def parse(ttir: str) -> list[Operation]:
    """The functions of a module."""
    places = _places(ttir)
    module: list[Operation] = []
    stack = [module]  # open regions
    owners: list[Operation | None] = [None]  # of the regions below the first
    for line in ttir.splitlines():
        text, reference = _without_places(line.strip())
        if not text or text.startswith(("#", "module", "//")):
            continue
        if text.startswith("}"):
            closed = owners[-1]
            stack.pop()
            owners.pop()
            if text.endswith("{"):  # "} else {", "} do {", "}, {"
                assert closed is not None
                _open(closed, stack, owners)
            elif closed is not None:
                closed.text += text.removeprefix("}")
                closed.place = places.get(reference, closed.place)
            if not stack:  # the end of the module
                break
            continue
        operation = _operation(text, places.get(reference, "an unknown line"))
        stack[-1].append(operation)
        if text.endswith("{"):
            _open(operation, stack, owners)
    return module


def _open(owner: Operation, stack: list[list[Operation]], owners: list[Operation | None]) -> None:
    owner.regions.append([])
    stack.append(owner.regions[-1])
    owners.append(owner)


def _operation(text: str, place: str) -> Operation:
    if text.startswith("^"):
        return Operation("block", (), (), text, place, _arguments(text))
    results: tuple[str, ...] = ()
    if found := ASSIGNMENT.match(text):
        results = tuple(name for part in found[1].split(", ") for name in _results(part))
        text = text[found.end() :]
    named = NAME.match(text)
    assert named is not None, text
    if named[1] == "tt.func":
        return Operation("tt.func", (), (), text, place, _arguments(text.partition("(")[2]))
    return Operation(named[1], results, tuple(VALUE.findall(text)), text, place)


def _arguments(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, kind.strip()) for name, kind in ARGUMENT.findall(text))


def _results(part: str) -> list[str]:
    name, _, count = part.partition(":")
    return [f"{name}#{index}" for index in range(int(count))] if count else [name]


def _without_places(line: str) -> tuple[str, str]:
    """The line without its `loc(...)`, and what the last of them names."""
    reference = ""
    while (start := line.find(" loc(")) >= 0:
        depth, end = 0, start + 4
        while True:
            depth += {"(": 1, ")": -1}.get(line[end], 0)
            end += 1
            if depth == 0:
                break
        found = REFERENCE.search(line, start, end)
        reference = found[0] if found else ""
        line = line[:start] + line[end:]
    return line, reference


def _places(ttir: str) -> dict[str, str]:
    """The source line behind every alias; an inlined operation's own, not its caller's."""
    aliases = dict(ALIAS.findall(ttir))
    lines = {
        name: f"{file.rpartition('/')[2]}:{line}" for name, file, line in FILE_LINE.findall(ttir)
    }
    for name in aliases:
        at, seen = name, set()
        while at not in lines and at not in seen:
            seen.add(at)
            found = REFERENCE.search(aliases.get(at, ""))
            if found is None:
                break
            at = found[0]
        if at in lines:
            lines[name] = lines[at]
    return lines
