"""The commands up to the moment a model would be loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastpost
from fastpost.cli.main import COMMANDS, main
from fastpost.cli.recipe import load_yaml
from fastpost.cli.train import RunFields

TEXTS = [{"text": "one"}, {"text": "two"}]
PAIRS = [{"prompt": "p", "chosen": "a", "rejected": "b"}]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder that passes for a model as long as nothing loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name}" in out for name in COMMANDS)
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"fastpost {fastpost.__version__}"


def test_unknown_command_suggests_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'dpo'?" in error_of(capsys, ["dop"])


def test_demo_takes_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "demo takes no options, got --fast" in error_of(capsys, ["demo", "--fast"])


def test_interrupt_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastpost.cli.demo.main", interrupted)
    assert main(["demo"]) == 130
    assert "fastpost demo: interrupted" in capsys.readouterr().err


def test_adapter_fields_make_a_peft_configuration() -> None:
    fields = RunFields(model="m", dataset="d", lora_r=4, use_dora=True)
    config = fields.lora_config()
    assert config is not None
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, "all-linear")
    assert config.use_dora
    assert RunFields(model="m", dataset="d").lora_config() is None


def test_overview_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fastpost.cli.main import main; main(['--help']);"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        name
        for name in COMMANDS
        if name
        not in (
            "decontaminate",
            "demo",
            "doctor",
            "export",
            "merge",
            "mix",
            "plan",
            "report",
            "run",
            "synthesise",
            "tune",
        )
    ],
)
def test_help_is_grouped_and_short(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    for expected in ("--config", "--dry-run", "--help-all", "--model", "--prefix_sharing"):
        assert expected in out
    assert "\n  --learning_rate number  (default: " in out
    assert "--adam_beta1" not in out
    assert len(out.splitlines()) < 150
    assert max(map(len, out.splitlines())) <= 100


def test_help_all_lists_every_field_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "--help-all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0][2:] for line in lines if line.startswith("  --") and "(" in line]
    assert set(fastpost.DPOConfig.__dataclass_fields__) < set(shown)
    assert len(shown) == len(set(shown))


def test_dry_run_prints_a_recipe_that_can_be_used_again(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first.yaml"
    data = jsonl(tmp_path / "pairs.jsonl", PAIRS)
    first.write_text(f"model: {model}\ndataset: {data}\nbeta: 0.3\nloss_type: [ipo]\n")
    argv = ["--use_cpu", "--report_to", "none", "--beta", "0.5", "--dry-run"]
    assert main(["dpo", "--config", str(first), *argv]) == 0
    out = capsys.readouterr().out
    assert "beta: 0.5  # --beta\n" in out
    assert f'loss_type: ["ipo"]  # {first}\n' in out
    assert "learning_rate: 1e-06\n" in out
    assert "# dataset: 1 rows, columns: prompt, chosen, rejected" in out

    second = tmp_path / "second.yaml"
    second.write_text(out)
    assert main(["dpo", "--config", str(second), "--dry-run"]) == 0
    assert load_yaml(capsys.readouterr().out) == load_yaml(out)


@pytest.mark.parametrize(
    ("command", "columns", "needed"),
    [
        (
            "sft",
            {"question": "q", "answer": "a"},
            "text or messages or conversations or prompt+completion or input_ids",
        ),
        ("sft", {"prompt": "p"}, "prompt+completion"),
        ("dpo", {"prompt": "p", "chosen": "a"}, "chosen+rejected"),
        ("kto", {"prompt": "p", "completion": "a"}, "prompt+completion+label"),
        ("orpo", {"chosen": "p", "rejected": "a"}, "prompt+chosen+rejected"),
        ("reward", {"prompt": "p"}, "chosen+rejected"),
    ],
)
def test_missing_columns_are_named(
    command: str,
    columns: dict[str, str],
    needed: str,
    tmp_path: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = jsonl(tmp_path / "rows.jsonl", [columns])
    error = error_of(capsys, [command, "--model", model, "--dataset", data, "--use_cpu"])
    assert f"dataset: {data}: {command.upper()} needs the columns " in error
    assert needed in error
    assert f"the data set has {list(columns)}" in error


def test_text_column_may_have_another_name(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = jsonl(tmp_path / "rows.jsonl", [{"body": "b"}])
    argv = ["sft", "--model", model, "--dataset", data, "--use_cpu", "--dry-run"]
    assert main([*argv, "--dataset_text_field", "body"]) == 0
    capsys.readouterr()
    assert "SFT needs the columns text or" in error_of(capsys, argv)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": "b"}\n'),
        ("rows.json", '[{"text": "a"}, {"text": "b"}]'),
        ("rows.csv", "text\na\nb\n"),
    ],
)
def test_file_kinds_and_splits(
    name: str, content: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    argv = ["sft", "--model", model, "--dataset", str(tmp_path / name), "--use_cpu", "--dry-run"]
    assert main([*argv, "--dataset_split", "train[:1]"]) == 0
    assert "# dataset: 1 rows, columns: text" in capsys.readouterr().out


def test_parquet_and_evaluation_data(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import Dataset

    Dataset.from_list(TEXTS).to_parquet(tmp_path / "rows.parquet")
    file = str(tmp_path / "rows.parquet")
    argv = ["sft", "--model", model, "--dataset", file, "--eval_dataset", file, "--use_cpu"]
    assert "eval_strategy is 'no'" in error_of(capsys, argv)
    assert main([*argv, "--eval_strategy", "epoch", "--dry-run"]) == 0
    assert "# eval_dataset: 2 rows, columns: text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dataset", "absent.jsonl"], "dataset: there is no file absent.jsonl"),
        (["--dataset", "{tmp}/notes.txt"], "notes.txt is of an unknown kind"),
        (["--dataset", "{tmp}/empty.jsonl"], "empty.jsonl"),
        (["--dataset", "{tmp}/broken.jsonl"], "broken.jsonl (train) cannot be loaded"),
        ([], "dataset is missing"),
        (["--dataset", "{tmp}/ok.jsonl", "--model", "./absent"], "./absent is not a model folder"),
        (["--dataset", "{tmp}/ok.jsonl", "--lora_alpha", "8"], "lora_alpha given without lora_r"),
        (["--dataset", "{tmp}/ok.jsonl", "--lora_r", "0"], "lora_r: expected 1 or more"),
        (["--dataset", "{tmp}/ok.jsonl", "--lora_r", "4", "--lora_dropout", "1"], "lora_dropout"),
        (["--dataset", "{tmp}/ok.jsonl", "--dtype", "bf16"], "dtype: expected auto, float32"),
        (["--dataset", "{tmp}/ok.jsonl", "--eval_strategy", "epoch"], "eval_dataset is None"),
        (["--dataset", "{tmp}/ok.jsonl", "--learning-rat", "1"], "Did you mean 'learning_rate'"),
        (["--dataset", "{tmp}/ok.jsonl", "--fp16", "--bf16"], "do not work together"),
        (
            [
                "--dataset",
                "{tmp}/ok.jsonl",
                "--dtype",
                "auto",
                "--model_init_kwargs",
                "{{dtype: auto}}",
            ],
            "dtype is given twice",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_with_one_line_and_code_2(
    extra: list[str],
    message: str,
    tmp_path: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    jsonl(tmp_path / "ok.jsonl", TEXTS)
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    argv = [text.format(tmp=tmp_path) for text in extra]
    if "--model" not in argv:
        argv = ["--model", model, *argv]
    error = error_of(capsys, ["sft", *argv, "--use_cpu"])
    assert message in error
    assert "fastpost sft: error: " in error
    assert "Traceback" not in error
