"""Imports run one way, files stay small and named after an idea, and nothing private is tracked."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_FOLDERS = ("fastpost", "kernels", "bench")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".cpp", ".h", ".yaml", ".yml", ".nix", ".json", ""}
# Put together here, so that this file does not hold them.
FORBIDDEN = re.compile(r"(?<![\w.])/wo" + r"rk/|\bTO" + r"DO\b|\bFIX" + r"ME\b|\bXX" + r"X\b")


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    path = os.pathsep.join([str(root), str(root / "kernels" / "torch-ext")])
    return subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )


def test_imports_keep_the_contracts() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("kernels/torch-ext/fastpost_kernels/planted.py", "import fastpost.packing", "layers run"),
        ("kernels/torch-ext/fastpost_kernels/planted.py", "import transformers", "kernels know"),
        ("fastpost/packing.py", "import fastpost.scoring", "rooms run"),
        ("fastpost/scoring.py", "import fastpost.trainers.sft", "rooms run"),
    ],
)
def test_a_planted_import_breaks_a_contract(
    file: str, line: str, broken: str, tmp_path: Path
) -> None:
    for folder in SOURCE_FOLDERS:
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as planted:
        planted.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"{broken}.*BROKEN", done.stdout), done.stdout


def test_files_fit_their_budget() -> None:
    lengths = {
        shown(path): len(path.read_text().splitlines()) for path in python_files(*SOURCE_FOLDERS)
    }
    assert lengths
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def function_lengths(source: str) -> dict[str, int]:
    functions = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}


def test_functions_fit_their_budget() -> None:
    too_long = {
        f"{shown(path)}:{name}": n
        for path in python_files(*SOURCE_FOLDERS)
        for name, n in function_lengths(path.read_text()).items()
        if n > MAX_FUNCTION_LINES
    }
    assert too_long == {}


def test_function_lengths_are_counted() -> None:
    assert function_lengths("@d\ndef f():\n    def g():\n        pass\n    return g\n") == {
        "f": 4,
        "g": 2,
    }


def test_files_are_named_after_an_idea() -> None:
    vague = [
        shown(path)
        for path in python_files(*SOURCE_FOLDERS, "tests")
        if VAGUE_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)
    ]
    assert vague == []


def test_no_forbidden_words() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    texts = [path for path in files if path.suffix in TEXT_SUFFIXES and path.is_file()]
    assert len(texts) > 20
    found = [
        f"{shown(path)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if FORBIDDEN.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("parts", [("see /wo", "rk/x"), ("# TO", "DO: later"), ("XX", "X")])
def test_forbidden_words_are_found(parts: tuple[str, str]) -> None:
    assert FORBIDDEN.search("".join(parts))
    assert not FORBIDDEN.search("https://host/network/a mastodon")


def test_every_cpp_file_is_compiled() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extension,) = settings["tool"]["setuptools"]["ext-modules"]
    assert extension["sources"] == sorted(f"csrc/{path.name}" for path in ROOT.glob("csrc/*.cpp"))
