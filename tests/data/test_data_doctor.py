"""The data doctor finds each planted mistake, and nothing in sound data."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from fastpost.cli.main import main
from fastpost.demo.smollm2 import smollm2_path
from fastpost.doctor.data_report import DataReport, check_data
from fastpost.doctor.data_sample import Sample, sample_of
from fastpost.doctor.render_checks import render

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Opens the thinking for the model at inference, and drops it from answers in training.
THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# Nothing special between prompt and answer, so that tokens may merge there.
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}" + CHATML.split("%}", 1)[1]
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SOUND: list[dict[str, Any]] = [
    {"messages": [user("Hi"), assistant("Hello."), user("Bye"), assistant("See you.")]},
    {"prompt": [user("2 + 2?")], "completion": [assistant("4")]},
    {"prompt": [user("2 + 2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    {"chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]},
    {"prompt": [user("2 + 2?")]},
]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path())


@pytest.fixture
def tokenizer(loaded: Any) -> Any:
    """A copy, which tests may change."""
    return deepcopy(loaded)


def findings(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> DataReport:
    return check_data(rows, tokenizer, **options)


@pytest.mark.parametrize("row", SOUND, ids=lambda row: "+".join(row))
def test_sound_rows_have_no_findings(row: dict[str, Any], tokenizer: Any) -> None:
    report = findings([row] * 3, tokenizer)
    assert report.findings == [] and report.rows == 3
    assert bool(report.scored) == bool(set(row) - {"prompt"})
    assert report.scored < report.tokens or not report.scored


@pytest.mark.parametrize(
    ("row", "check", "level", "what", "fix"),
    [
        ({"messages": [user("Hi"), assistant("")]}, "empty turns", "error", "assistant", "drop"),
        ({"messages": [user(" \n"), assistant("a")]}, "empty turns", "warning", "user", "fill"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "roles",
            "error",
            "'human' is unknown",
            "'user'",
        ),
        ({"messages": [user("a"), user("b"), assistant("c")]}, "roles", "warning", "two", "join"),
        (
            {"messages": [user("a"), assistant("b"), user("c")]},
            "roles",
            "warning",
            "do not end",
            "never learnt",
        ),
        ({"messages": [user("a")]}, "scored share", "error", "no token", "add an answer"),
        (
            {"messages": [user("a"), {"role": "system", "content": "s"}, assistant("b")]},
            "roles",
            "warning",
            "after the beginning",
            "first message",
        ),
        ({"messages": [assistant("b")]}, "roles", "warning", "before any user", "user turn"),
        ({"prompt": [user("a"), assistant("b")]}, "roles", "error", "prompt ends", "user's turn"),
        (
            {"messages": [user("say <|im_end|> now"), assistant("b")]},
            "BOS/EOS/pad",
            "error",
            "holds '<|im_end|>'",
            "remove",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "preference", "error", "same", "drop"),
        ({"prompt": "Name: ", "completion": "Bob"}, "SFT = DPO = RL", "warning", "begins", "space"),
        ({"prompt": "", "completion": "b"}, "scored share", "warning", "every token", "prompt"),
        ({"messages": None}, "columns", "error", "null", "drop"),
        ({"messages": ["a"]}, "columns", "error", "expected texts", "drop"),
        ({"messages": [user("a")], "tools": "{"}, "columns", "error", "not JSON", "schemas"),
    ],
)
def test_a_planted_mistake_is_found_with_its_row(
    row: dict[str, Any], check: str, level: str, what: str, fix: str, tokenizer: Any
) -> None:
    report = findings([SOUND[0], row, row], tokenizer)
    (found,) = [f for f in report.findings if f.check == check and what in f.what]
    assert (found.level, found.row, found.rows) == (level, 1, 2)
    assert fix in found.fix
    assert found.text or check == "empty turns"


def test_renders_are_those_of_trl(tmp_path: Path, tokenizer: Any) -> None:
    chat = {k: SOUND[1][k] for k in ("prompt", "completion")}
    plain = {"prompt": "Name:", "completion": " Bob"}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    for row in (chat, plain, {"text": "Just a text."}):
        args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True)
        data = Dataset.from_list([row])
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
        (theirs,) = trainer.train_dataset
        sample = sample_of(0, row, {})
        assert isinstance(sample, Sample)
        ((ours,), problems) = render(sample, tokenizer, None)
        assert problems == []
        mask = theirs.get("completion_mask") or [int(x != -100) for x in theirs["labels"]]
        assert ours.input_ids == theirs["input_ids"]
        # TRL also scores the white space that the template writes after the end of the turn.
        ours_mask = [int(label != -100) for label in ours.labels]
        end = len(ours_mask) - ours_mask[::-1].index(1)
        assert ours_mask[:end] == mask[:end]
        assert tokenizer.decode(ours.input_ids[end:]).strip() == ""


def test_a_template_that_parts_training_from_inference(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKS
    (found, *_) = findings([SOUND[1]], tokenizer).findings
    assert (found.check, found.level, found.row) == ("train = inference", "error", 0)
    assert "<think>" in found.text.split("training:")[0]


def test_tokens_that_merge_over_the_edge(tokenizer: Any) -> None:
    tokenizer.chat_template = BARE
    report = findings([SOUND[1], SOUND[0]], tokenizer)
    (found,) = [f for f in report.findings if f.check == "SFT = DPO = RL"]
    assert found.row == 1 and "Hello" in found.text


def test_a_template_that_refuses(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    report = findings([{"messages": [user("a"), user("b"), assistant("c")]}], tokenizer)
    (found,) = [f for f in report.findings if f.check == "template"]
    assert "Roles must alternate" in found.what and "user -> user -> assistant" in found.text


def test_no_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    (found,) = findings([SOUND[0]], tokenizer).findings
    assert "no chat template" in found.what


def test_answers_that_never_stop(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "")
    report = findings(SOUND[:2], tokenizer)
    (found,) = [f for f in report.findings if "do not end with an end token" in f.what]
    assert (found.check, found.level, found.row) == ("BOS/EOS/pad", "error", 0)


def test_padding_that_is_eos_is_noted(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    (found,) = findings([SOUND[0]], tokenizer).findings
    assert (found.level, found.row) == ("note", None)


def test_an_answer_cut_off(tokenizer: Any) -> None:
    row = {"prompt": [user("word " * 50)], "completion": [assistant("a")]}
    report = findings([SOUND[1], row], tokenizer, max_length=45)
    (found,) = report.findings
    assert found.row == 1 and "within max_length=45" in found.what and report.truncated == 1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SOUND[:2]))
    argv = ["doctor", "data", str(path), "--model", str(smollm2_path())]
    assert main(argv) == 0
    assert "nothing found" in capsys.readouterr().out
    path.write_text(json.dumps({"messages": [user("Hi"), assistant("")]}) + "\n")
    assert main([*argv, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0]["check"] == "empty turns"
    assert main(argv) == 1
    assert "(row 0, 1 in all)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"mesages": []}\n', "rename 'mesages' to 'messages'"),
        ("", "is empty"),
        ('{"text": \n', "line 1 is not JSON"),
    ],
)
def test_command_names_broken_files(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert main(["doctor", "data", str(path), "--model", str(smollm2_path())]) == 2
    assert message in capsys.readouterr().err
