"""What the README shows runs, and what it claims was measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.readme import with_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_table_is_what_the_results_say() -> None:
    assert with_table(README) == README


def test_the_example_runs(tmp_path) -> None:
    example = next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "DPOTrainer" in block
    )
    assert len(example.strip().splitlines()) <= 12
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "packed forwards" in done.stdout


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(path) -> None:
    assert (ROOT / path).exists()
