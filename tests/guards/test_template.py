"""A model keeps the tokenizer and template it was trained with, or says what has changed."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainerControl, TrainerState

import fastpost
from fastpost.demo.smollm2 import smollm2_path
from fastpost.guards.template import (
    FILE_NAME,
    TemplateFingerprint,
    check_fingerprint,
    fingerprint,
    save_fingerprint,
)
from tests.trainers.conftest import *  # noqa: F403  fixtures: tokenizer, model, data, run_trainer


@pytest.fixture
def own_tokenizer(tokenizer) -> PreTrainedTokenizerFast:
    """The shared tokenizer, free to be changed."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        chat_template=tokenizer.chat_template,
    )


@pytest.mark.parametrize("which", ["bytes", "smollm2"])
def test_unchanged_through_saving_and_loading(which, own_tokenizer, tmp_path) -> None:
    tokenizer = own_tokenizer
    if which == "smollm2":
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    tokenizer.save_pretrained(tmp_path)
    save_fingerprint(tmp_path, tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert json.loads(json.dumps(fingerprint(tokenizer))) == fingerprint(again)
    check_fingerprint(tmp_path, again)
    check_fingerprint(str(tmp_path), again)
    check_fingerprint(SimpleNamespace(config=SimpleNamespace(_name_or_path=str(tmp_path))), again)


def test_another_template_is_refused_with_a_diff(own_tokenizer, tmp_path) -> None:
    save_fingerprint(tmp_path, own_tokenizer)
    own_tokenizer.chat_template = own_tokenizer.chat_template.replace("assistant\n", "assistant: ")
    with pytest.raises(ValueError) as error:
        check_fingerprint(tmp_path, own_tokenizer)
    message = str(error.value)
    assert "--- model's" in message and "+++ given" in message
    removed = [line for line in message.splitlines() if line.startswith("-{%")]
    assert removed and removed[0].endswith(r"assistant\n")
    assert f"from_pretrained({str(tmp_path)!r})" in message and FILE_NAME in message
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path=str(tmp_path)))
    with pytest.raises(ValueError, match="another tokenizer or chat template"):
        check_fingerprint(model, own_tokenizer)


def test_no_template_and_named_templates_are_told_apart(own_tokenizer, tmp_path) -> None:
    save_fingerprint(tmp_path, own_tokenizer)
    own_tokenizer.chat_template = {"default": own_tokenizer.chat_template, "rag": "{{ x }}"}
    with pytest.raises(ValueError, match=r"\+\[rag\]"):
        check_fingerprint(tmp_path, own_tokenizer)
    own_tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"\+\(none\)"):
        check_fingerprint(tmp_path, own_tokenizer)


def test_other_special_and_added_tokens_are_named(own_tokenizer, tmp_path) -> None:
    save_fingerprint(tmp_path, own_tokenizer)
    own_tokenizer.eos_token = "<pad>"
    with pytest.raises(ValueError, match=r"token eos_token: the model's is \['<\|im_end\|>', 2\]"):
        check_fingerprint(tmp_path, own_tokenizer)
    own_tokenizer.eos_token = "<|im_end|>"
    check_fingerprint(tmp_path, own_tokenizer)
    own_tokenizer.add_tokens(["<new>"])
    new_id = len(own_tokenizer) - 1
    with pytest.raises(ValueError, match=rf"added token {new_id}: the model's is None(.|\n)*vocab"):
        check_fingerprint(tmp_path, own_tokenizer)


def test_two_tokens_exchanged_are_seen(own_tokenizer, tmp_path) -> None:
    save_fingerprint(tmp_path, own_tokenizer)
    backend = json.loads(own_tokenizer.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(own_tokenizer.backend_tokenizer).from_str(json.dumps(backend)),
        pad_token="<pad>",
        eos_token="<|im_end|>",
        chat_template=own_tokenizer.chat_template,
    )
    assert fingerprint(other)["vocab_size"] == fingerprint(own_tokenizer)["vocab_size"]
    with pytest.raises(ValueError, match="vocabulary: the model's has"):
        check_fingerprint(tmp_path, other)


def test_nothing_to_compare_is_fine(own_tokenizer, tmp_path) -> None:
    check_fingerprint(tmp_path, own_tokenizer)
    check_fingerprint("some/hub-name", own_tokenizer)
    check_fingerprint(SimpleNamespace(), own_tokenizer)
    check_fingerprint(SimpleNamespace(config=SimpleNamespace(_name_or_path="")), own_tokenizer)
    save_fingerprint(tmp_path, own_tokenizer)
    check_fingerprint(tmp_path, None)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_file_is_named(text, own_tokenizer, tmp_path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"{FILE_NAME} is not a fingerprint"):
        check_fingerprint(tmp_path, own_tokenizer)


def test_a_newer_file_is_not_guessed_at(own_tokenizer, tmp_path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(fingerprint(own_tokenizer) | {"schema": 99}))
    with pytest.raises(ValueError, match="has schema 99, this version reads 1"):
        check_fingerprint(tmp_path, own_tokenizer)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    own_tokenizer, tmp_path, monkeypatch
) -> None:
    before = save_fingerprint(tmp_path, own_tokenizer).read_bytes()

    def fail(*args):
        raise OSError("disk full")

    own_tokenizer.chat_template = "{{ other }}"
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_fingerprint(tmp_path, own_tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_a_processor_is_its_tokenizer_and_its_own_template(own_tokenizer) -> None:
    processor = SimpleNamespace(tokenizer=own_tokenizer, chat_template="{{ images }}")
    expected = fingerprint(own_tokenizer)
    assert fingerprint(processor)["vocab_sha256"] == expected["vocab_sha256"]
    assert fingerprint(processor)["chat_template"] == "{{ images }}"


def test_checkpoints_carry_it(model, prompt_completion_data, run_trainer, tokenizer) -> None:
    class Trainer(fastpost.SFTTrainer):
        def __init__(self, *args, callbacks=(), **kwargs):
            super().__init__(*args, callbacks=[*callbacks, TemplateFingerprint()], **kwargs)

    trainer = run_trainer(
        Trainer,
        fastpost.SFTConfig,
        model,
        prompt_completion_data,
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    checkpoint = f"{trainer.args.output_dir}/checkpoint-1"
    with open(f"{checkpoint}/{FILE_NAME}") as file:
        assert json.load(file) == fingerprint(tokenizer)
    check_fingerprint(checkpoint, AutoTokenizer.from_pretrained(checkpoint))
    shutil.rmtree(checkpoint)


def test_only_the_main_process_writes(tmp_path, own_tokenizer) -> None:
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = TrainerState(global_step=3, is_world_process_zero=False)
    callback = TemplateFingerprint()
    callback.on_save(args, state, TrainerControl(), processing_class=own_tokenizer)
    assert list(tmp_path.iterdir()) == []
    state.is_world_process_zero = True
    callback.on_save(args, state, TrainerControl(), processing_class=own_tokenizer)
    assert (tmp_path / "checkpoint-3" / FILE_NAME).is_file()
