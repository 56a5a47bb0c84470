"""Decontamination against a brute-force reference, and what it writes."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpost.cli.main import main
from fastpost.data import ngram_index, rolling_hash
from fastpost.data.decontaminate import (
    Contaminated,
    decontaminate,
    find_contamination,
    index_evaluation_sets,
)
from fastpost.data.ngram_index import NgramIndex
from fastpost.data.passages import passages
from fastpost.data.rows import DataError, read_rows
from fastpost.data.units import TokenUnits, WordUnits, word_spans, words

QUESTION = "What is the sum of the first seventeen odd numbers that are not divisible by three?"


PLAIN_WORD = r"(?:[^\W_]|[\u0300-\u036f])+"  # enough for scripts with spaces


def plain_words(text: str) -> list[str]:
    """Written without the code under test."""
    found = re.findall(PLAIN_WORD, text)
    return [unicodedata.normalize("NFKC", word).casefold() for word in found]


def contaminated(
    train: list[dict[str, Any]], sets: dict[str, list[dict[str, Any]]], n: int
) -> tuple[dict[int, set[str]], list[tuple[int, int, int]]]:
    """By comparing every window with every other: row -> names of the sets it matches; and the
    stretches of matching windows as (row, first character, end).
    """
    grams = {
        name: {
            tuple(plain_words(text)[i : i + n])
            for row in rows
            for _, text in passages(row)
            for i in range(len(plain_words(text)) - n + 1)
        }
        for name, rows in sets.items()
    }
    found: dict[int, set[str]] = {}
    stretches: list[tuple[int, int, int]] = []
    for number, row in enumerate(train):
        for _, text in passages(row):
            units = plain_words(text)
            spans = [match.span() for match in re.finditer(PLAIN_WORD, text)]
            before = -2
            for i in range(len(units) - n + 1):
                names = {name for name in grams if tuple(units[i : i + n]) in grams[name]}
                if not names:
                    continue
                found.setdefault(number, set()).update(names)
                begin = stretches.pop()[1] if i == before + 1 else spans[i][0]
                stretches.append((number, begin, spans[i + n - 1][1]))
                before = i
    return found, stretches


def random_text(rng: random.Random, length: int) -> str:
    """Few words, so that windows are shared by chance; odd ones among them."""
    vocabulary = [
        "a",
        "B",
        "cé",
        "ce\u0301",
        "straße",
        "STRASSE",
        "İ",
        "x_y",
        "3.14",
        "don't",
        "ﬁn",
    ]
    return "".join(
        rng.choice(vocabulary) + rng.choice([" ", "\n", ", ", " — ", "\u00a0", "\0"])
        for _ in range(length)
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_equals_brute_force_on_random_texts(n: int) -> None:
    rng = random.Random(n)
    for _ in range(10):
        train = [{"text": random_text(rng, rng.randrange(30))} for _ in range(40)]
        train += [
            {"messages": [{"role": "user", "content": random_text(rng, 9)}] * 2} for _ in range(5)
        ]
        sets = {
            name: [{"q": random_text(rng, 20), "a": random_text(rng, 4)} for _ in range(3)]
            for name in ("one", "two")
        }
        sets["one"][0]["q"] += " " + train[7]["text"]
        sets["two"][0]["q"] += QUESTION
        expected = contaminated(train, sets, n)
        index = index_evaluation_sets(sets, WordUnits(), n)
        found: dict[int, set[str]] = {}
        stretches = []
        for batch, result in find_contamination(train, index):
            found |= {batch.first + i: names for i, names in result.sets.items()}
            stretches += [(match.row, match.start, match.end) for match in result.matches]
        assert (found, stretches) == expected
    assert expected[0] or n > 8


def test_a_hash_that_always_collides_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_index, "finished", lambda hashes: hashes & np.uint64(1))
    test_equals_brute_force_on_random_texts(3)


@pytest.mark.parametrize("n", range(1, 18))
def test_rolling_hash_is_the_polynomial(n: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 63, 40).astype(np.uint64)
    expected = []
    for i in range(len(values) - n + 1):
        total = 0
        for value in values[i : i + n].tolist():
            total = (total * rolling_hash.BASE + value) % (1 << 64)
        expected.append(total)
    assert rolling_hash.rolling(values, n).tolist() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's  **Bold**_x_!\n", ["it", "s", "bold", "x"]),
        ("Ｆｕｌｌ ｗｉｄｔｈ", ["full", "width"]),
        ("cafe\u0301 Straße", ["café", "strasse"]),
        ("你好 abc", ["你", "好", "abc"]),
        ("", []),
        ("?! \0 …", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected
    assert len(word_spans(text)) == len(expected)


def test_words_of_every_ascii_character_are_those_of_the_pattern() -> None:
    text = "".join(f"a{chr(code)}Z " for code in range(128))
    assert words(text) == words(text + "é")[:-1] == [text[a:b].lower() for a, b in word_spans(text)]


@pytest.mark.parametrize(
    "altered",
    [
        QUESTION.upper(),
        QUESTION.replace(" ", "\n\n"),
        "**" + QUESTION.replace(" ", "** — “"),
        "Before it. " + QUESTION + " And after.",
        "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in QUESTION),
    ],
)
def test_writing_it_otherwise_hides_nothing(altered: str) -> None:
    index = index_evaluation_sets({"set": [{"q": QUESTION}]}, WordUnits())
    ((_, found),) = find_contamination([{"text": altered}], index)
    (match,) = found.matches
    assert words(match.text) == words(QUESTION)
    assert altered[match.start : match.end] == match.text
    assert words(match.evaluation_text) == words(QUESTION)[:13]


def test_windows_do_not_span_two_turns() -> None:
    half = words(QUESTION)
    turns = [" ".join(half[:8]), " ".join(half[8:])]
    rows = [{"messages": [{"role": "user", "content": turn} for turn in turns]}]
    index = index_evaluation_sets({"set": [{"q": QUESTION}]}, WordUnits())
    assert not next(find_contamination(rows, index))[1].matches


def test_n_longer_than_every_text_is_refused() -> None:
    with pytest.raises(DataError, match="has 99 words, so nothing could match"):
        index_evaluation_sets({"set": [{"q": QUESTION}]}, WordUnits(), 99)
    with pytest.raises(ValueError, match="at least one unit"):
        NgramIndex(WordUnits(), 0)


def test_training_rows_shorter_than_n_stay(tmp_path: Path) -> None:
    index = index_evaluation_sets({"set": [{"q": QUESTION}, {"q": "short"}]}, WordUnits())
    summary = decontaminate([{"text": "short"}, {"text": ""}], index, output=tmp_path / "o.jsonl")
    assert (summary.rows, summary.contaminated, summary.short_rows) == (2, 0, {"set": 1})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


ROWS = [
    {"id": 0, "messages": [{"role": "user", "content": "Good morning."}]},
    {"id": 1, "messages": [{"role": "user", "content": f"Tell me: {QUESTION} Quickly."}]},
    {"id": 2, "messages": [{"role": "user", "content": "Grüße"}]},
]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("out_kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("processes", [1, 2])
def test_command_drops_and_reports(
    kind: str, out_kind: str, processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / f"train{kind}", ROWS)
    test = write(tmp_path / f"test{kind}", [{"question": QUESTION, "answer": "It is a number."}])
    output = tmp_path / f"clean{out_kind}"
    argv = ["decontaminate", str(train), "--against", str(test), "--output", str(output)]
    assert main([*argv, "--processes", str(processes)]) == 0
    assert "3 rows, 1 contaminated" in capsys.readouterr().out
    assert list(read_rows(output)) == [ROWS[0], ROWS[2]]
    (match,) = read_rows(tmp_path / "clean.contamination.jsonl")
    assert match["row"] == 1 and match["place"] == "messages[0].content"
    assert match["text"] == QUESTION.rstrip("?")
    assert match["found_in"] == [{"set": str(test), "row": 0, "place": "question"}]


def test_mask_removes_the_stretch_alone(tmp_path: Path) -> None:
    index = index_evaluation_sets({"set": [{"q": QUESTION}]}, WordUnits())
    decontaminate(ROWS, index, action="mask", output=tmp_path / "o.jsonl")
    rows = list(read_rows(tmp_path / "o.jsonl"))
    assert rows[1]["messages"][0]["content"] == "Tell me: [removed]? Quickly."
    assert [rows[0], rows[2]] == [ROWS[0], ROWS[2]]


@pytest.mark.parametrize("action", ["drop", "mask"])
def test_parquet_keeps_its_types(action: Any, tmp_path: Path) -> None:
    schema = pa.schema({"t": pa.large_string(), "n": pa.int32(), "day": pa.date32()})
    rows = [{"t": "a", "n": 1, "day": None}, {"t": QUESTION, "n": None, "day": None}]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "t.parquet")
    index = index_evaluation_sets({"set": [{"q": QUESTION}]}, WordUnits())
    decontaminate(tmp_path / "t.parquet", index, action=action, output=tmp_path / "o.parquet")
    written = pq.read_table(tmp_path / "o.parquet")
    assert written.schema.equals(schema)
    left = [rows[0]] if action == "drop" else [rows[0], {**rows[1], "t": "[removed]?"}]
    assert written.to_pylist() == left


def test_nothing_left_is_an_empty_file(tmp_path: Path) -> None:
    index = index_evaluation_sets({"set": [{"q": QUESTION}]}, WordUnits())
    for name in ("o.jsonl", "o.parquet"):
        decontaminate([{"t": QUESTION}], index, output=tmp_path / name)
    assert (tmp_path / "o.jsonl").read_bytes() == b""
    assert pq.read_table(tmp_path / "o.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "0"], "expected at least 1"),
        (["--by", "tokens"], "needs --model"),
        (["--model", "m"], "words need no tokenizer"),
        (["--by", "tokens", "--model", "m", "--processes", "2"], "runs in one process"),
        (["--n", "0"], "at least one unit"),
        (["--action", "stop"], "writes no rows"),
        (["--output", "o.txt"], "unknown kind, expected .jsonl or .parquet"),
        (["--nn", "3"], "unrecognized arguments: --nn 3"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "t.jsonl", ROWS)
    argv = ["decontaminate", str(train), "--against", str(train)]
    assert main([*argv, "--output", str(tmp_path / "o.jsonl"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_training_data_is_never_overwritten(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", ROWS)
    index = index_evaluation_sets({"set": [{"q": QUESTION}]}, WordUnits())
    with pytest.raises(DataError, match="is the training data itself"):
        decontaminate(train, index, output=tmp_path / "." / "t.jsonl")


def test_overlapping_stretches_are_masked_once(tmp_path: Path) -> None:
    sets = {"set": [{"q": "a b c d"}, {"q": "c d e f"}]}
    index = index_evaluation_sets(sets, WordUnits(), 4)
    decontaminate([{"t": "x a b c d e f y"}], index, action="mask", output=tmp_path / "o.jsonl")
    assert list(read_rows(tmp_path / "o.jsonl")) == [{"t": "x [removed] y"}]


def test_rows_that_stay_keep_their_bytes(tmp_path: Path) -> None:
    lines = b'{"text": "a",   "n": 1.0}\n\n{"text":"\\u00e9"}'
    (tmp_path / "t.jsonl").write_bytes(lines)
    index = index_evaluation_sets({"set": [{"q": QUESTION}]}, WordUnits())
    decontaminate(tmp_path / "t.jsonl", index, output=tmp_path / "o.jsonl")
    assert (tmp_path / "o.jsonl").read_bytes() == lines.replace(b"\n\n", b"\n") + b"\n"


def test_stop_reports_and_writes_no_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", ROWS)
    test = write(tmp_path / "e.jsonl", [{"q": QUESTION}])
    argv = ["decontaminate", str(train), "--against", str(test), "--action", "stop"]
    assert main([*argv, "--report", str(tmp_path / "r.jsonl")]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.jsonl", "r.jsonl", "t.jsonl"]
    index = index_evaluation_sets({"set": [{"q": QUESTION}]}, WordUnits())
    with pytest.raises(Contaminated) as raised:
        decontaminate(ROWS, index, action="stop")
    assert raised.value.summary.contaminated == 1


def test_counts_of_evaluation_rows_found() -> None:
    sets = {"set": [{"q": QUESTION}, {"q": QUESTION + " Explain."}, {"q": QUESTION[::-1]}]}
    index = index_evaluation_sets(sets, WordUnits())
    summary = decontaminate([ROWS[1], ROWS[1]], index)
    assert summary.evaluation_rows_found == {"set": 2}
    assert summary.matched_by_set == {"set": 2}


def test_datasets_in_memory() -> None:
    from datasets import Dataset, DatasetDict

    data = DatasetDict(train=Dataset.from_list(ROWS).select([2, 1]))
    index = index_evaluation_sets({"set": Dataset.from_list([{"q": QUESTION}])}, WordUnits())
    summary = decontaminate(data, index, processes=2)
    assert (summary.rows, summary.contaminated) == (2, 1)
    with pytest.raises(DataError, match="no split 'other'"):
        decontaminate(data, index, split="other")


def test_tokens() -> None:
    from transformers import AutoTokenizer

    from fastpost.demo.smollm2 import smollm2_path

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    index = index_evaluation_sets({"set": [{"q": QUESTION}]}, TokenUnits(tokenizer), 8)
    rows = [{"text": QUESTION}, {"text": QUESTION.upper()}]
    ((_, found),) = find_contamination(rows, index)
    assert [(match.row, match.text) for match in found.matches] == [(0, QUESTION)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        (b'{"text": "a"}\n\n[1]\n', "line 3 holds a JSON list"),
        (b"", "is empty"),
        (b"\n\n", "has no rows"),
        (b'{"n": 1}\n', "no text in its first row; its columns are n"),
        (b'{"text": "\xff"}\n', "line 1 is not JSON"),
    ],
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_broken_data_is_named_and_leaves_nothing(
    content: bytes,
    message: str,
    processes: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = tmp_path / "t.jsonl"
    train.write_bytes(content)
    test = write(tmp_path / "e.jsonl", [{"q": QUESTION}])
    argv = ["decontaminate", str(train), "--against", str(test), "--processes", processes]
    assert main([*argv, "--output", str(tmp_path / "o.jsonl")]) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.jsonl", "t.jsonl"]


def test_wrong_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "t.jsonl", ROWS)
    argv = ["decontaminate", str(train), "--against", str(train), "--columns", "txt"]
    assert main([*argv, "--output", str(tmp_path / "o.jsonl")]) == 2
    assert "has none of the columns txt; it has id, messages" in capsys.readouterr().err


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "o.jsonl").write_text("before")
    monkeypatch.setattr("os.fsync", full)
    index = index_evaluation_sets({"set": [{"q": QUESTION}]}, WordUnits())
    with pytest.raises(DataError, match="the disk is full"):
        decontaminate(ROWS, index, output=tmp_path / "o.jsonl")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]
