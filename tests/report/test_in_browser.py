"""The page in Chromium: no error, no request, charts drawn, readable on a phone, dark and light.

The browser comes with `pip install 'fastpost[browser]'` (Qt WebEngine); without it this is skipped,
and `test_report.py` reads the page's structure alone.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpost.report.page import page_of
from fastpost.report.reading import read_run
from tests.report.conftest import make_run

CHILD = Path(__file__).with_name("browser_child.py")


def look(page: Path, width: int, scheme: str) -> dict[str, Any]:
    command = [sys.executable, str(CHILD), str(page), str(width), scheme]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "cannot open shared object file" in done.stderr:
        pytest.skip("Qt WebEngine lacks a library of the system: " + done.stderr.strip()[-200:])
    seen = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert seen, done.stdout + done.stderr
    return json.loads(seen[0].removeprefix("SEEN "))


def brightness(colour: str) -> float:
    return sum(map(float, colour.removeprefix("rgb(").rstrip(")").split(",")))


@pytest.mark.skipif(
    importlib.util.find_spec("PySide6") is None, reason="no browser: pip install fastpost[browser]"
)
def test_the_page_in_chromium(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page_of([read_run(make_run(tmp_path / "run"))]), encoding="utf-8")
    grounds = {}
    for width, scheme in ((390, "light"), (1200, "dark")):
        seen = look(path, width, scheme)
        assert seen["loaded"] and seen["console"] == []
        assert seen["requests"] == [path.as_uri()]
        assert seen["charts"] == seen["drawn"] > 5
        assert seen["page_width"] <= seen["width"] == width  # nothing to scroll sideways
        assert seen["font"] >= 14 and seen["narrowest"] > 25
        assert abs(brightness(seen["ground"]) - brightness(seen["ink"])) > 400
        grounds[scheme] = brightness(seen["ground"])
    assert grounds["light"] > 700 and grounds["dark"] < 100
