"""`fastpost synthesise` against an endpoint on this machine, killed as processes are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpost.cli.main import main
from fastpost.data.rows import read_rows
from fastpost.synthesis.provenance import has_its_hash
from tests.chat_model.endpoint_server import reply, serving, user_text
from tests.synthesis.fake_teacher import FakeTeacher
from tests.trainers.conftest import tiny_model, tokenizer  # noqa: F401


def taught(body: dict[str, Any]) -> Any:
    """What the fake teacher says."""
    [(_, said)] = FakeTeacher().stream([body["messages"]], seed=body["seed"])
    assert said is not None
    return reply(said.text, usage=(10, 20))


def topics(folder: Path) -> str:
    path = folder / "topics.jsonl"
    path.write_text("".join(json.dumps({"topic": t}) + "\n" for t in ("tides", "bread", "chess")))
    return str(path)


def command(folder: Path, url: str, name: str = "rows.jsonl", **more: Any) -> list[str]:
    options = {
        "data": topics(folder),
        "output": str(folder / name),
        "model": "fake",
        "endpoint": url,
        "per-topic": 2,
        "concurrency": 1,
        **more,
    }
    return ["teacher", *(f"--{key}={value}" for key, value in options.items())]


def test_a_teacher_makes_rows(tmp_path: Path, capsys: Any) -> None:
    with serving(taught) as server:
        argv = ["synthesise", *command(tmp_path, server.url, "prompt.parquet")]
        assert main([*argv, "--estimate", "--reply-price", "2", "--seconds-per-call", "3"]) == 0
        out = capsys.readouterr().out
        assert "to be asked: 9 calls" in out and "0.02 at the given price" in out
        assert server.received == [] and not (tmp_path / "prompt.parquet").exists()
        assert main(argv) == 0
        asked = len(server.received)
        assert asked == 9 and "6 rows of 6 candidates" in capsys.readouterr().out
        assert main([*argv, "--min-words", "500"]) == 0
        assert len(server.received) == asked  # other filters ask for nothing twice
    out = capsys.readouterr().out
    assert "6 dropped, answer below 500 words" in out and "0 replies asked for, 9 found" in out
    with serving(taught) as server:  # the endpoint has moved: its replies are still known
        assert main(["synthesise", *command(tmp_path, server.url, "prompt.parquet")]) == 0
        assert server.received == []
    rows = list(read_rows(str(tmp_path / "prompt.parquet")))
    assert len(rows) == 6 and all(map(has_its_hash, rows))
    assert rows[0]["provenance"]["prompt_source"] == "topics.jsonl#0: tides"


@pytest.mark.parametrize("deaths", [(2,), (1, 4, 7)])
def test_a_killed_process_loses_no_row_and_repeats_no_call(
    tmp_path: Path, deaths: tuple[int, ...]
) -> None:
    """SIGKILL while a request waits for its reply; only that one is sent again."""
    running: list[subprocess.Popen[bytes]] = []
    fatal = set(deaths)

    def act(body: dict[str, Any]) -> Any:
        if len(server.received) - 1 in fatal:
            fatal.discard(len(server.received) - 1)
            running[-1].kill()
            running[-1].wait(60)
        return taught(body)

    with serving(act) as server:
        argv = command(tmp_path, server.url)
        while True:
            run = [sys.executable, "-m", "fastpost.cli.main", "synthesise", *argv]
            with server.lock:
                running.append(subprocess.Popen(run, stdout=subprocess.DEVNULL))
            if running[-1].wait(timeout=120) == 0:
                break
            assert not (tmp_path / "rows.jsonl").exists() and len(running) <= len(deaths)
        sent = [(user_text(body), body["seed"]) for body in server.received]
    assert len(running) == len(deaths) + 1
    assert len(set(sent)) == 9 and len(sent) == 9 + len(deaths)
    with serving(taught) as server:
        assert main(["synthesise", *command(tmp_path, server.url, "whole.jsonl")]) == 0
        assert len(server.received) == 9
    assert (tmp_path / "rows.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_answers_that_a_reward_accepts(tmp_path: Path, capsys: Any) -> None:
    def act(body: dict[str, Any]) -> Any:
        a, b = (int(part) for part in user_text(body).rstrip("?").split("+"))
        return reply(f"The sum is \\boxed{{{a + b + (body['seed'] % 2)}}}.")

    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i}+{i}?", "solution": str(2 * i)} for i in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "kept.jsonl"
    with serving(act) as server:
        argv = ["synthesise", "reject", f"--data={prompts}", f"--output={output}", "--model=m"]
        argv += [f"--endpoint={server.url}", "--samples=6", "--threshold=1"]
        assert main([*argv, "--reward=maths"]) == 0
    out = capsys.readouterr().out
    kept = list(read_rows(str(output)))
    assert [row["messages"][1]["content"] for row in kept] == [
        f"The sum is \\boxed{{{2 * i}}}." for i in range(6)
    ]
    assert "6 of 6 prompts have an accepted answer" in out and "reward below 1" in out
    file = tmp_path / "rules.yaml"
    file.write_text("- {kind: contains, phrases: [sum]}\n")
    with serving(act) as server:
        argv[5] = f"--endpoint={server.url}"
        assert main([*argv, f"--reward={file}"]) == 0
        assert server.received == []


def test_judges_filter_rows(tmp_path: Path, capsys: Any) -> None:
    def act(body: dict[str, Any]) -> Any:
        return reply('{"grade": 8}') if body["model"].startswith("judge") else taught(body)

    with serving(act) as server:
        file = tmp_path / "judges.yaml"
        file.write_text(
            "".join(f"- {{model: judge {i}, endpoint: '{server.url}'}}\n" for i in range(3))
        )
        argv = ["synthesise", *command(tmp_path, server.url, judges=file, criteria="sense")]
        assert main([*argv, "--estimate"]) == 0 and server.received == []
        assert "to be asked: 27 calls" in capsys.readouterr().out
        assert main([*argv, "--min-score", "0.9"]) == 0
        assert "6 dropped, judged below 0.9" in capsys.readouterr().out
        asked = len(server.received)
        assert asked == 9 + 18
        assert main([*argv, "--min-score", "0.5"]) == 0
        assert "6 rows of 6" in capsys.readouterr().out and len(server.received) == asked


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--output=a.txt"], "must be a .jsonl or .parquet"),
        (["--data=absent.jsonl"], "there is no file absent.jsonl"),
        (["--column=subject"], "row 0 has the columns ['topic']"),
        (["--criteria=sense"], "--criteria needs --judges"),
        (["--batch-size=3"], "a setting of a local model"),
        (["--per-topic=0"], "per_topic is 0"),
        (["--per-topic=x"], "invalid int value"),
        (["--scrypt=Latin"], "unrecognized"),
        (["--api-key-env=NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        ([], "401"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(
    argv: list[str], complaint: str, tmp_path: Path, capsys: Any
) -> None:
    with serving(lambda body: (401, "who are you?")) as server:
        assert main(["synthesise", *command(tmp_path, server.url), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastpost synthesise: error: ") and complaint in error
    assert len(error.splitlines()) == 1


def test_a_local_model_speaks_as_the_user(tmp_path: Path, tokenizer: Any, capsys: Any) -> None:  # noqa: F811
    tiny_model(260).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    capsys.readouterr()
    argv = ["synthesise", "magpie", f"--model={tmp_path / 'tiny'}", "--count=3", "--max-tokens=4"]
    argv.append(f"--output={tmp_path / 'rows.jsonl'}")
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "to be asked: 6 calls" in out and "rows of 3 candidates" in out
    assert main(argv) == 0
    assert "0 replies asked for" in capsys.readouterr().out


def test_help_and_methods(capsys: Any) -> None:
    assert main(["synthesise", "--help"]) == 0 and main(["synthesise"]) == 2
    assert "magpie" in capsys.readouterr().out
    assert main(["synthesise", "magic"]) == 2
    assert "there are magpie, teacher, reject" in capsys.readouterr().err
    for method in ("magpie", "teacher", "reject"):
        assert main(["synthesise", method, "--help"]) == 0
        out = capsys.readouterr().out
        assert "--near-duplicates" in out and ("--endpoint" in out) == (method != "magpie")
