"""Recipes and flags become typed values, or an error that names the place and the remedy."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from fastpost.cli.recipe import UsageError, convert, load_yaml, read_recipe


class Schedule(Enum):
    LINEAR = "linear"
    COSINE = "cosine"


HINTS: dict[str, Any] = {
    "learning_rate": float,
    "max_steps": int,
    "packing": bool,
    "bf16": bool | None,
    "max_length": int | None,
    "output_dir": str | None,
    "loss_type": list[str],
    "loss_weights": list[float] | None,
    "schedule_kwargs": dict[str, Any] | str | None,
    "schedule": Schedule | str,
    "dry": bool,
}


def recipe_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("1e-5", float, 1e-5),
        (3, float, 3.0),
        ("3", int, 3),
        ("-1", int, -1),
        ("true", bool, True),
        ("off", bool, False),
        ("null", int | None, None),
        ("none", int | None, None),
        ("none", str | None, "none"),
        ("null", str | None, None),
        (None, str | None, None),
        ("7", int | str | None, 7),
        ("auto", int | str | None, "auto"),
        ("[a, b]", list[str], ["a", "b"]),
        ("a", list[str], ["a"]),
        (["1", 2], list[float], [1.0, 2.0]),
        ("a", str | list[str], "a"),
        ('{"a": {"b": 1e-6}}', dict[str, Any] | str | None, {"a": {"b": 1e-6}}),
        ("config.json", dict[str, Any] | str | None, "config.json"),
        ({"rope": "yes"}, dict[str, bool] | None, {"rope": True}),
        ("false", str | Literal[False] | None, False),
        ("me/space", str | Literal[False] | None, "me/space"),
        ("cosine", Schedule | str, "cosine"),
    ],
    ids=repr,
)
def test_value_becomes_the_annotated_type(value: Any, hint: Any, expected: Any) -> None:
    result = convert(value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("fast", float, "expected number, got 'fast'"),
        ("1.5", int, "expected integer, got '1.5'"),
        (1.5, int, "expected integer, got 1.5"),
        (True, int, "expected integer, got True"),
        (1, bool, r"expected true\|false, got 1"),
        ("maybe", bool | None, r"expected true\|false or null, got 'maybe'"),
        (None, int, "expected integer, got None"),
        (7, str, "expected text, got 7 .put quotes"),
        ([1], list[str], "expected text, got 1"),
        ({"a": 1}, list[str], "expected list of text"),
        (["a"], dict[str, Any] | None, "expected mapping or null"),
        ("cosin", Schedule | str, "expected one of linear, cosine, .*Did you mean 'cosine'"),
    ],
    ids=repr,
)
def test_wrong_value_is_refused(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(value, hint)


def test_flags_override_the_recipe(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "learning_rate: 1e-5\nmax_steps: 7\nloss_type: [sigmoid]\n")
    recipe = read_recipe(
        ["--config", path, "--max-steps=9", "--packing", "--loss_weights", "1", "0.5"], HINTS
    )
    assert recipe.values == {
        "learning_rate": 1e-5,
        "max_steps": 9,
        "loss_type": ["sigmoid"],
        "packing": True,
        "loss_weights": [1.0, 0.5],
    }
    assert recipe.given["learning_rate"] == path
    assert recipe.given["max_steps"] == "--max_steps"
    assert not recipe.dry_run


def test_negative_numbers_are_values_not_flags() -> None:
    assert read_recipe(["--max_steps", "-1", "--dry-run"], HINTS).values == {"max_steps": -1}
    assert read_recipe(["--dry-run"], HINTS).dry_run


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--learning_rat", "1"],
            "--learning_rat: there is no such field. Did you mean 'learning_rat",
        ),
        (["--confg", "x"], "--confg: .*Did you mean 'config'"),
        (["--qqqq", "1"], "--qqqq: there is no such field.$"),
        (["--max_steps", "soon"], "--max_steps: expected integer, got 'soon'"),
        (["--max_steps", "1", "2"], "--max_steps: expected integer"),
        (["--max_steps"], "--max_steps: needs a value .integer."),
        (["--max_steps", "1", "--max-steps", "2"], "--max_steps is given twice"),
        (["recipe.yaml"], "unexpected argument 'recipe.yaml'"),
        (["--config", "absent.yaml"], "absent.yaml: No such file"),
        (["--config"], "--config takes one file, got 0"),
        (["--dry-run", "yes"], "--dry-run takes no value, got 'yes'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_on_the_command_line_names_the_flag(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_recipe(argv, HINTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "recipe.yaml: learning_rat: .*Did you mean 'learning_rate'"),
        ("max_steps: soon\n", "recipe.yaml: max_steps: expected integer, got 'soon'"),
        (
            "max_steps: 1\nbf16: true\nmax_steps: 2\n",
            "line 3, column 1: the key 'max_steps' is given",
        ),
        ("schedule_kwargs: {a: 1, a: 2}\n", "the key 'a' is given twice"),
        ("output_dir: !!python/object/apply:os.getcwd []\n", "line 1, .*could not determine"),
        ("output_dir: !secret x\n", "line 1, .*could not determine"),
        ("output_dir: !!timestamp 2024-01-01\n", "line 1, .*could not determine"),
        ("output_dir: [a\n", "recipe.yaml: not a readable recipe: line 2"),
        ("- a\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("config: other.yaml\n", "recipe.yaml: config: there is no such field"),
    ],
)
def test_mistake_in_the_recipe_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_recipe(["--config", recipe_file(tmp_path, text)], HINTS)


def test_yaml_reads_plain_words_and_numbers_as_written() -> None:
    text = (
        "{a: no, b: 1e-6, c: 2024-01-01, d: 1:30, e: true, f: null, g: -3, h: 010, i: '5', j: .5}"
    )
    assert load_yaml(text) == {
        "a": "no",
        "b": 1e-6,
        "c": "2024-01-01",
        "d": "1:30",
        "e": True,
        "f": None,
        "g": -3,
        "h": 10.0,  # not 8, as PyYAML's octals have it
        "i": "5",
        "j": 0.5,
    }
