"""From a YAML recipe and command-line flags to typed field values.

Every field of a run may stand in the recipe (`learning_rate: 1e-5`) or on the command line
(`--learning_rate 1e-5`), which wins. Both go through one `convert`, driven by the dataclass
annotations, so a value means the same wherever it stands.

Why not TRL's `TrlParser`: it takes recipe values as they are (PyYAML reads `1e-5` as text and
`no` as False), keeps the last of two equal keys, and offers no suggestion for a misspelt name.
"""

from __future__ import annotations

import difflib
import enum
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

import yaml


class UsageError(Exception):
    """A mistake in a recipe, a flag or the data: shown without a traceback, exit code 2."""


@dataclass(frozen=True)
class Recipe:
    """Typed `values` by field name, where each was `given`, and whether to stop before training."""

    values: dict[str, Any]
    given: dict[str, str]
    dry_run: bool


def read_recipe(argv: list[str], hints: Mapping[str, Any]) -> Recipe:
    """Reads `--config FILE`, then the flags over it.

    Args:
        argv: the arguments after the command's name.
        hints: field name to resolved type annotation, for every field there is.

    Raises:
        UsageError: unknown, repeated or wrongly typed fields, or an unreadable recipe.
    """
    flags = _split_flags(argv)
    dry_run = flags.pop("dry_run", None)
    if dry_run:
        raise UsageError(f"--dry-run takes no value, got {dry_run[0]!r}")
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    if "config" in flags:
        paths = flags.pop("config")
        if len(paths) != 1:
            raise UsageError(f"--config takes one file, got {len(paths)}")
        for name, value in load_yaml_file(Path(paths[0])).items():
            where = f"{paths[0]}: {name}"
            _check_name(name, hints, where, extra=())
            values[name], given[name] = _converted(value, hints[name], where), paths[0]
    for name, texts in flags.items():
        where = f"--{name}"
        _check_name(name, hints, where, extra=("config", "dry_run", "help", "help_all"))
        if not texts and bool not in members(hints[name]):
            raise UsageError(f"{where}: needs a value ({describe(hints[name])})")
        values[name], given[name] = _converted(_flag_value(texts), hints[name], where), where
    return Recipe(values, given, dry_run is not None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'a' or 'b'?`, or nothing when no known name is close."""
    close = difflib.get_close_matches(str(name), list(known), n=3)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def _split_flags(argv: list[str]) -> dict[str, list[str]]:
    """`--a 1 2 --b=3` to {"a": ["1", "2"], "b": ["3"]}; dashes in names become underscores."""
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for token in argv:
        if token.startswith("--"):
            name, has_value, value = token[2:].partition("=")
            name = name.replace("-", "_")
            if name in flags:
                raise UsageError(f"--{name} is given twice")
            values = flags[name] = [value] if has_value else []
        elif values is None:
            raise UsageError(f"unexpected argument {token!r}: write --field value")
        else:
            values.append(token)
    return flags


def _flag_value(texts: list[str]) -> str | list[str] | bool:
    if not texts:
        return True  # `--packing` alone switches it on
    return texts[0] if len(texts) == 1 else texts


def _check_name(name: str, hints: Mapping[str, Any], where: str, extra: tuple[str, ...]) -> None:
    if name not in hints:
        raise UsageError(f"{where}: there is no such field.{did_you_mean(name, [*hints, *extra])}")


def _converted(value: Any, hint: Any, where: str) -> Any:
    try:
        return convert(value, hint)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


# The names of types in messages and in the help.
TYPE_NAMES = {
    bool: "true|false",
    int: "integer",
    float: "number",
    str: "text",
    list: "list",
    dict: "mapping",
    types.NoneType: "null",
}
BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def members(hint: Any) -> list[Any]:
    """The alternatives of an annotation: `int | None` to [int, NoneType], `int` to [int]."""
    if get_origin(hint) in (Union, types.UnionType):
        return [member for part in get_args(hint) for member in members(part)]
    return [hint]


def describe(hint: Any) -> str:
    """An annotation in words: `int | None` to "integer or null"."""
    names = []
    for member in members(hint):
        plain = get_origin(member) or member
        if plain is Literal:
            names += [str(choice).lower() for choice in get_args(member)]
        elif isinstance(plain, type) and issubclass(plain, enum.Enum):
            return "|".join(choice.value for choice in plain)
        elif plain is list and get_args(member):
            names.append(f"list of {describe(get_args(member)[0])}")
        else:
            names.append(TYPE_NAMES.get(plain, getattr(plain, "__name__", str(plain))))
    return " or ".join(sorted(names, key="null".__eq__))


def convert(value: Any, hint: Any) -> Any:
    """`value`, a text or what YAML made of one, as the type `hint` asks for.

    Raises:
        ValueError: the value is of no type the annotation allows.
    """
    kinds = members(hint)
    plain = {get_origin(kind) or kind: kind for kind in kinds}
    if isinstance(value, str):
        return _convert_text(value, hint, plain)
    if isinstance(value, list) and list in plain:
        args = get_args(plain[list])
        return [convert(item, args[0]) for item in value] if args else value
    if isinstance(value, dict) and dict in plain:
        args = get_args(plain[dict])
        return {
            k: v if not args or args[1] is Any else convert(v, args[1]) for k, v in value.items()
        }
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and int not in plain
        and float in plain
    ):
        return float(value)
    if type(value) in plain or (Literal in plain and value in get_args(plain[Literal])):
        return value
    quote = " (put quotes around it)" if str in plain and isinstance(value, int | float) else ""
    raise ValueError(f"expected {describe(hint)}, got {value!r}{quote}")


def _convert_text(text: str, hint: Any, plain: dict[Any, Any]) -> Any:
    word = text.lower()
    for kind in plain:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            choices = [choice.value for choice in kind]
            if text not in choices:
                hint_text = did_you_mean(text, choices)
                raise ValueError(f"expected one of {', '.join(choices)}, got {text!r}.{hint_text}")
            return text
    if types.NoneType in plain and (word in ("null", "~") or (word == "none" and str not in plain)):
        return None
    if word in BOOL_WORDS and (bool in plain or BOOL_WORDS[word] in get_args(plain.get(Literal))):
        return BOOL_WORDS[word]
    for number in (int, float):
        if number in plain:
            try:
                return number(text)
            except ValueError:
                pass  # another alternative may fit
    if text[:1] in ("[", "{") and (list in plain or dict in plain):
        parsed = load_yaml(text)
        if not isinstance(parsed, str):
            return convert(parsed, hint)
    if str in plain:
        return text
    if list in plain:
        return convert([text], hint)
    raise ValueError(f"expected {describe(hint)}, got {text!r}")


PLAIN_YAML_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain types: `no` is not False, `1e-5` is a number; no dates, no equal keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: build
        for tag, build in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in PLAIN_YAML_TYPES
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be text", key.start_mark
                )
            if key.value in seen:
                message = f"the key '{key.value}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"(?:null|~|)", ["n", "~", ""]),
    ("bool", r"(?:true|false|True|False)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first)


def load_yaml(text: str) -> Any:
    """Parses one YAML or JSON value. Raises ValueError naming line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{getattr(error, 'problem', None) or error}") from None


def load_yaml_file(path: Path) -> dict[str, Any]:
    """Reads a recipe: a mapping of field names to values. Raises UsageError naming the file."""
    try:
        recipe = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not a readable recipe: {error}") from None
    if not isinstance(recipe, dict):
        raise UsageError(
            f"{path}: a recipe is a mapping of `field: value` lines, got {recipe!r:.60}"
        )
    return recipe
