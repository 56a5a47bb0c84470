"""Mixtures: exact shares, the same rows every time, resumed at every position."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpost.cli.main import main
from fastpost.data.mix_recipe import MixRecipe, MixSource, read_mix_recipe
from fastpost.data.mixture import Mixture, apportion
from fastpost.data.rows import DataError, read_rows


def rows(name: str, count: int, length: int = 3) -> list[dict[str, Any]]:
    return [{"id": f"{name}{i}", "text": " ".join([name] * length)} for i in range(count)]


def write(path: Path, given: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(given), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in given))
    return str(path)


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def recipe(tmp_path: Path) -> MixRecipe:
    """A source drawn whole, one drawn in part and one drawn more than twice."""
    return MixRecipe(
        {
            "a": MixSource(write(tmp_path / "a.jsonl", rows("a", 10)), count=10),
            "b": MixSource(write(tmp_path / "b.parquet", rows("b", 9)), weight=1),
            "c": MixSource(write(tmp_path / "c.jsonl", rows("c", 4)), weight=3),
        },
        rows=22,
    )


def counts(mixture: Mixture) -> Counter[str]:
    return Counter(row["id"][0] for row in mixture)


def test_shares_are_exact_and_repeats_are_whole_epochs(recipe: MixRecipe) -> None:
    drawn = Counter(row["id"] for row in Mixture(recipe))
    assert Counter(name[0] for name in drawn.elements()) == {"a": 10, "b": 3, "c": 9}
    assert {drawn[f"a{i}"] for i in range(10)} == {1}
    assert sorted(drawn[f"c{i}"] for i in range(4)) == [2, 2, 2, 3]
    order = [row["id"][0] for row in Mixture(recipe)]
    assert order != sorted(order)


def test_resumes_at_every_position(recipe: MixRecipe) -> None:
    whole = list(Mixture(recipe))
    assert len(whole) == 22
    for stop in range(len(whole) + 1):
        first = Mixture(recipe)
        begun = list(islice(first, stop))
        state = first.state_dict()
        resumed = Mixture(recipe)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert begun + list(resumed) == whole


def test_order_depends_on_the_seed_alone(recipe: MixRecipe) -> None:
    def order(seed: int) -> list[str]:
        return [row["id"] for row in Mixture(MixRecipe(recipe.sources, 22, seed=seed))]

    assert order(1) == order(1) != order(2)


_shared: list[Mixture] = []  # what forked processes find in their memory


def _shared_row(position: int) -> dict[str, Any]:
    return _shared[0][position]


def test_forked_readers_do_not_disturb_each_other(recipe: MixRecipe) -> None:
    _shared[:] = [Mixture(recipe)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(_shared_row, [*range(22)] * 20, 1)
    assert found == [*Mixture(recipe)] * 20


def test_state_counts_the_rows_yielded(recipe: MixRecipe) -> None:
    mixture = Mixture(recipe)
    stream = iter(mixture)
    for expected in range(1, len(mixture) + 1):
        next(stream)
        assert mixture.state_dict()["position"] == expected


@pytest.mark.parametrize("change", ["seed", "data", "normalise"])
def test_a_state_of_another_mixture_is_refused(
    change: str, recipe: MixRecipe, tmp_path: Path
) -> None:
    state = Mixture(recipe).state_dict()
    if change == "data":
        write(tmp_path / "a.jsonl", [*rows("a", 9), {"id": "a9", "text": "A A A"}])
    seed, normalise = int(change == "seed"), ["bold"] * (change == "normalise")
    other = Mixture(MixRecipe(recipe.sources, 22, seed=seed, normalise=normalise))
    with pytest.raises(DataError, match="belongs to another mixture"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1, (80, 20)), (2, (67, 33)), (1e6, (50, 50)), (1e-3, (100, 0))]
)
def test_temperature(temperature: float, expected: tuple[int, int], tmp_path: Path) -> None:
    sources = {
        name: MixSource(write(tmp_path / f"{name}.jsonl", rows(name, size)))
        for name, size in (("a", 8), ("b", 2))
    }
    found = counts(Mixture(MixRecipe(sources, 100, temperature=temperature)))
    assert (found["a"], found["b"]) == expected


def test_long_share(tmp_path: Path) -> None:
    a = [*rows("s", 95), *rows("l", 5, 50)]
    sources = {
        "a": MixSource(write(tmp_path / "a.jsonl", a)),
        "b": MixSource(write(tmp_path / "b.jsonl", rows("b", 100))),
    }
    natural = Mixture(MixRecipe(sources, length_edges=[10, 50], long_share=0.02))
    assert counts(natural) == {"s": 95, "l": 5, "b": 100}
    raised = Mixture(MixRecipe(sources, length_edges=[10, 50], long_share=0.2))
    assert counts(raised) == {"s": 60, "l": 40, "b": 100}
    assert raised.length_at is not None
    assert sorted(raised.length_at.tolist()) == [3] * 160 + [50] * 40
    with pytest.raises(DataError, match=r"fill 50\.0% of the mixture at most"):
        Mixture(MixRecipe(sources, length_edges=[10, 50], long_share=0.6))


@given(
    st.integers(0, 1000),
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=6).filter(any),
)
def test_apportion(total: int, shares: list[float]) -> None:
    found = apportion(total, shares)
    assert found.sum() == total and (found >= 0).all()
    for share, number in zip(shares, found.tolist(), strict=True):
        assert abs(number - total * share / sum(shares)) < 1 + 1e-6
        assert share > 0 or number == 0


RECIPE = """
rows: 12
length_edges: [4]
max_length: 5
normalise: [opening]
sources:
  chat: {data: chat.jsonl, weight: 2}
  long: {data: long.jsonl, count: 4}
"""


def chat(answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_command(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    write(tmp_path / "chat.jsonl", [chat(f"Sure! Answer {i}.") for i in range(8)])
    write(tmp_path / "long.jsonl", [chat("one two three four five six") for _ in range(4)])
    output = tmp_path / f"mixed{kind}"
    assert main(["mix", str(path), "--output", str(output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sources"]["chat"]["rows"] == 8 and report["sources"]["long"]["rows"] == 4
    assert report["truncated"] == 4 and report["near_duplicates"] == 3
    assert report["habits"]["opening"] == 0 and report["turns"] == [2, 2, 2, 2]
    assert report["buckets"] == {"0-3": 8 / 12, "4+": 4 / 12}
    written = list(read_rows(output))
    assert written == list(Mixture(read_mix_recipe(path)))
    assert main(["mix", str(path)]) == 0
    assert "chat: 8 rows (66.7%)" in capsys.readouterr().out


def test_columns_that_do_not_fit_one_parquet_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpost.cli.mix._WRITTEN_AT_ONCE", 1)
    path = tmp_path / "recipe.yaml"
    path.write_text("sources: {a: a.jsonl, b: b.jsonl}")
    write(tmp_path / "a.jsonl", [{"text": "x", "more": {"p": 1}}] * 5)
    write(tmp_path / "b.jsonl", [{"text": "x", "more": {"q": 1}}] * 5)
    assert main(["mix", str(path), "--output", str(tmp_path / "o.parquet")]) == 2
    assert "differing columns" in capsys.readouterr().err
    assert not list(tmp_path.glob("*o.parquet*"))
    assert main(["mix", str(path), "--output", str(tmp_path / "o.jsonl")]) == 0
    assert len(list(read_rows(tmp_path / "o.jsonl"))) == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [a]", "expected a mapping with `sources"),
        ("sources: {a: {file: a.jsonl}}", "a mapping with `data: FILE`"),
        ("sources: {a: {data: a.jsonl, wieght: 2}}", "did you mean 'weight'"),
        ("sources: {a: {data: a.jsonl, weight: 0}}", "sources.a: weight: 0, expected"),
        ("sources: {a: {data: a.jsonl, weight: 1, count: 1}}", "not both"),
        ("sources: {a: a.jsonl}\nnormalise: [bolt]", "did you mean 'bold'"),
        ("sources: {a: a.jsonl}\nrows: 1.5", "rows: 1.5, expected a whole number"),
        ("sources: {a: a.jsonl}\nlength_edges: [5, 5]", "expected lengths that ascend"),
        ("sources: {a: a.jsonl}\nlong_share: 0.1", "long_share needs length_edges"),
        ("sources: {a: a.jsonl}\ntemperature: 0", "temperature: 0, expected"),
        ("sources: {a: {data: a.jsonl, count: 2}}\nrows: 3", "counts add up to 2"),
        ("sources: {a: b.jsonl}", "there is no file"),
        ("sources: {a: bad.jsonl}", "line 1 is not JSON"),
        ("sources: {a: empty.jsonl}", "is empty"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_are_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.jsonl", rows("a", 3))
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["mix", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err
