"""The help of a training command: the fields worth knowing, each on a line or two, in groups."""

from __future__ import annotations

import dataclasses
import enum
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from fastpost.cli.recipe import describe, members

WIDTH = 100
INDENT = 6
MAX_CHOICES = 12
ENOUGH_CHARS = 40

Field = dataclasses.Field[Any]


def command_help(
    name: str,
    summary: str,
    groups: Mapping[str, Iterable[Field]],
    hints: Mapping[str, Any],
    show_all: bool,
) -> str:
    """The text of `fastpost NAME --help`.

    Args:
        name: the command.
        summary: what it does and the data it takes.
        groups: title to dataclass fields, in the order shown.
        hints: field name to resolved type annotation.
        show_all: these are all fields (`--help-all`), so none are left to point to.
    """
    lines = [f"usage: fastpost {name} --config recipe.yaml [--field value ...]", ""]
    lines += textwrap.wrap(
        f"{summary} A field stands in the recipe (YAML lines `field: value`) or on the command "
        "line, which wins. Lists and mappings are JSON or YAML text: --field [a,b].",
        WIDTH,
    )
    lines += ["", "options:", "  --config FILE  the recipe"]
    lines += ["  --dry-run      print the resolved fields and the data's columns, then stop"]
    lines += [
        "  --help-all     every field there is" if not show_all else "  --help         a summary"
    ]
    for title, fields in groups.items():
        lines += ["", f"{title}:"]
        for field in fields:
            lines += _field_lines(field, hints[field.name])
    return "\n".join(lines)


def default_of(field: Field) -> Any:
    """A field's default; `dataclasses.MISSING` if it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _field_lines(field: Field, hint: Any) -> list[str]:
    default = default_of(field)
    if isinstance(default, enum.Enum):
        default = default.value
    if default is dataclasses.MISSING:
        note = "required"
    elif default is None:
        note = "default: none"
    else:
        note = f"default: {str(default).lower() if isinstance(default, bool) else default}"
    kind = describe(hint)
    choices = any(isinstance(m, type) and issubclass(m, enum.Enum) for m in members(hint))
    if choices:
        words = kind.split("|")
        more = len(words) - MAX_CHOICES
        shown = ", ".join(words[:MAX_CHOICES]) + (f" and {more} more" if more > 0 else "")
        kind = "word"
    head = f"  --{field.name} {kind.removesuffix(' or null')}  ({note})"
    body = _summary(str(field.metadata.get("help", "")))
    if choices:
        body += f": {shown}"
    pad = " " * INDENT
    return [head, *textwrap.wrap(body, WIDTH, initial_indent=pad, subsequent_indent=pad)]


def _summary(text: str) -> str:
    """The first sentences of a help text, until they say something."""
    summary = ""
    for sentence in re.split(r"(?<=[a-z\)`'\]])\.\s", " ".join(text.replace("%%", "%").split())):
        summary += f"{'. ' if summary else ''}{sentence.rstrip('.')}"
        if len(summary) >= ENOUGH_CHARS:
            break
    return summary
