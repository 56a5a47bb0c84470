"""A report from the files of a run: what it shows, and that the page stands alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastpost.cli.main import main
from fastpost.report.chart import chart
from fastpost.report.page import page_of
from fastpost.report.reading import RECORD, NoRun, read_run
from tests.report.conftest import FINDING, begin, log, write

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags in order, and whether each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_shows_all_of_a_run_and_fetches_nothing(run: Path) -> None:
    text = page_of([read_run(run)])
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?://|src=|url\(|@import|<script|<link", text)
    names = [tag for tag, _ in page.tags]
    viewport = {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert ("meta", viewport) in page.tags
    assert "prefers-color-scheme: dark" in text
    charted = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    for metric in ("loss", "rewards/margins", "kl", "entropy", "tokens/s", "peak memory, GiB"):
        assert metric in charted
    assert names.count("polyline") + names.count("circle") >= len(charted)
    words = " ".join(page.words)
    for said in (
        "answers grow <fast>", "mean 400, was 100", "a lower beta",  # health, escaped
        "What is <b>2 + 2</b>?", "five", "four & more",  # both answers
        "0.600", "0.500", "[0.400, 0.600]", "mmlu",  # scores
        "3.00 GiB", "4.00 GiB", "7.00 GiB",  # memory
        "12.0 GPU h, $36", "180 s".replace("180 s", "3 min"), "2 x NVIDIA H100", "started 2 times",
    ):  # fmt: skip
        assert said in words, said
    assert '<span class="worse">0.500</span>' in text


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_a_chart_draws_where_the_values_are() -> None:
    figure = chart("loss", [("", [(0, 3.0), (5, 1.0), (10, 2.0)])])
    points = re.search(r'points="([^"]+)"', figure)
    assert points is not None
    places = [tuple(map(float, place.split(","))) for place in points[1].split()]
    box = numbers(re.search(r'viewBox="([^"]+)"', figure)[1])  # type: ignore[index]
    assert all(0 <= x <= box[2] and 0 <= y <= box[3] for x, y in places)
    (x0, high), (x1, low), (x2, middle) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert middle - high == pytest.approx((low - high) / 2, abs=0.2)


def test_a_chart_takes_anything() -> None:
    assert "no finite points, 1 points are not finite" in chart("x", [("", [(1, float("nan"))])])
    assert "circle" in chart("x", [("", [(1, 2.0)])])
    many = chart("x", [("", [(i, 1.0) for i in range(10_000)])])
    assert len(many) < 20_000
    figure = chart("<x>", [("a&b", [(1, 0.0), (2, 1.0)]), ("", [])])
    assert "&lt;x&gt;" in figure and "a&amp;b" in figure


def test_runs_are_overlaid_each_in_its_colour(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "alone"
    write(other / RECORD, begin(0), log(1, loss=0.9), log(2, loss=0.8))
    page = page_of([read_run(run), read_run(other)])
    assert Page(page).open == []
    one = read_run(run)
    both = page_of([one, one])
    loss = re.search(r'aria-label="loss">.*?</svg>', both)
    assert loss is not None
    assert 'class="line c0"' in loss[0] and 'class="line c1"' in loss[0]


def test_a_resumed_run_takes_back_what_the_kill_undid(tmp_path: Path) -> None:
    write(
        tmp_path / RECORD,
        begin(0), log(1, loss=3.0), log(2, loss=2.0), {**FINDING, "step": 2}, log(3, loss=9.0),
        begin(1), log(2, loss=2.5), log(3, loss=2.2), {"event": "end", "step": 3, "seconds": 7.0},
    )  # fmt: skip
    with open(tmp_path / RECORD, "a") as file:
        file.write('{"event": "lo')  # cut off
    stage = read_run(tmp_path).stages[0]
    assert stage.curves["loss"] == [(1, 3.0), (2, 2.5), (3, 2.2)]
    assert stage.health == [] and stage.finished and stage.kind == "dpo"
    # 6 s were spent before the kill, 7 after
    assert stage.seconds == 13.0
    assert stage.tokens == 100 + 300


def test_the_command_writes_a_page_or_words(run: Path, capsys, tmp_path: Path) -> None:
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert "exam 0.500 [0.400, 0.600]" in said and "answers grow <fast>; mean 400" in said
    assert main(["report", str(run), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(NoRun):
        read_run(tmp_path / "nothing")
