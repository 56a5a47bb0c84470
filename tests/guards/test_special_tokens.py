"""BOS twice, EOS not learnt and padding learnt are found in tokenised rows; sound rows pass."""

from __future__ import annotations

import warnings

import pytest
from datasets import Dataset, IterableDataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from fastpost.demo.smollm2 import smollm2_path
from fastpost.guards.assistant_mask import render_with_mask
from fastpost.guards.special_tokens import check_special_tokens, special_token_findings
from fastpost.scoring import FastpostWarning
from tests.guards.test_assistant_mask import CHAT, LLAMA, byte_tokenizer, chatml


def llama():
    return byte_tokenizer(
        LLAMA, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", bos="<|begin|>"
    )


def row(tokenizer, messages=CHAT) -> dict[str, list[int]]:
    ids, mask = render_with_mask(tokenizer, messages)
    labels = [token if bit else -100 for token, bit in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels}


def findings(rows, tokenizer, **options) -> list[tuple[str, str]]:
    found = special_token_findings(Dataset.from_list(rows), tokenizer, **options)
    return [(finding.level, finding.what) for finding in found]


def separate_padding(tokenizer):
    tokenizer.pad_token = "!"  # a token of its own, which no text here holds
    return tokenizer


@pytest.mark.parametrize("make", [llama, chatml])
def test_sound_rows_pass(make) -> None:
    tokenizer = separate_padding(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_special_tokens(Dataset.from_list([row(tokenizer)] * 3), tokenizer) == []


def test_sound_rows_of_a_model_whose_bos_opens_every_turn_pass() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    assert tokenizer.bos_token == "<|im_start|>"
    assert findings([row(tokenizer)], tokenizer) == []
    text = tokenizer("plain text<|im_end|>")["input_ids"]  # plain text has no BOS there
    assert findings([{"input_ids": text, "labels": text}], tokenizer) == []


@pytest.mark.parametrize("place", [0, 9])
def test_bos_twice_is_an_error_with_the_row(place) -> None:
    tokenizer = separate_padding(llama())
    bad = row(tokenizer)
    bad["input_ids"].insert(place, tokenizer.bos_token_id)
    bad["labels"].insert(place, -100)
    with pytest.raises(ValueError, match=r"1 of 2 rows have BOS '<\|begin\|>' more(.|\n)*add_spe"):
        check_special_tokens(Dataset.from_list([row(tokenizer), bad]), tokenizer)
    (found,) = special_token_findings([bad], tokenizer)
    assert found.example.count("<|begin|>") == 2


def test_bos_twice_is_found_where_bos_opens_every_turn() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    bad = row(tokenizer)
    bad["input_ids"].insert(0, tokenizer.bos_token_id)
    bad["labels"].insert(0, -100)
    assert [level for level, _ in findings([bad], tokenizer)] == ["error"]


def test_bos_missing_is_a_warning() -> None:
    tokenizer = separate_padding(llama())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<|begin|> $A", None, [("<|begin|>", tokenizer.bos_token_id)]
    )
    bad = {name: column[1:] for name, column in row(tokenizer).items()}
    with pytest.warns(FastpostWarning, match="1 of 1 rows do not begin with BOS"):
        check_special_tokens(Dataset.from_list([bad]), tokenizer)


@pytest.mark.parametrize("make", [llama, chatml])
def test_eos_never_scored_is_an_error(make) -> None:
    tokenizer = separate_padding(make())
    bad = row(tokenizer)
    bad["labels"] = [-100 if t == tokenizer.eos_token_id else t for t in bad["labels"]]
    with pytest.raises(ValueError, match=r"2 of 2 scored stretches do not end(.|\n)*\[\["):
        check_special_tokens(Dataset.from_list([bad]), tokenizer)


def test_eos_sometimes_unscored_is_a_warning() -> None:
    tokenizer = separate_padding(chatml())
    bad = row(tokenizer)
    bad["labels"][-2] = -100  # the last turn's <|im_end|>, a newline follows
    assert bad["input_ids"][-2] == tokenizer.eos_token_id
    with pytest.warns(FastpostWarning, match="1 of 2 scored stretches"):
        check_special_tokens(Dataset.from_list([bad]), tokenizer)


def test_white_space_scored_after_the_end_token_is_fine() -> None:
    tokenizer = separate_padding(chatml())
    whole = row(tokenizer)
    whole["labels"][-1] = whole["input_ids"][-1]
    assert whole["labels"][-1] != tokenizer.eos_token_id
    assert findings([whole], tokenizer) == []


def test_a_turn_that_reaches_the_cut_needs_no_end_token() -> None:
    tokenizer = separate_padding(chatml())
    cut = {name: column[:-5] for name, column in row(tokenizer).items()}
    assert len(findings([cut], tokenizer)) == 1
    assert findings([cut], tokenizer, max_length=len(cut["labels"])) == []


def padded(tokenizer, pad_label: int) -> dict[str, list[int]]:
    whole = row(tokenizer)
    num = len(whole["input_ids"])
    return {
        "input_ids": whole["input_ids"] + [tokenizer.pad_token_id] * 3,
        "labels": whole["labels"] + [pad_label] * 3,
        "attention_mask": [1] * num + [0] * 3,
    }


@pytest.mark.parametrize("make", [chatml, lambda: separate_padding(chatml())])
def test_scored_padding_is_an_error_also_when_padding_is_eos(make) -> None:
    tokenizer = make()
    assert "error" not in dict(findings([padded(tokenizer, -100)], tokenizer))
    bad = padded(tokenizer, tokenizer.pad_token_id)
    (error,) = (what for level, what in findings([bad], tokenizer) if level == "error")
    assert error == "1 of 1 rows have labels where attention_mask is 0"


def test_padding_id_among_labels_without_an_attention_mask_is_a_warning() -> None:
    tokenizer = separate_padding(chatml())
    bad = padded(tokenizer, tokenizer.pad_token_id)
    del bad["attention_mask"]
    levels = [what for level, what in findings([bad], tokenizer) if level == "warning"]
    assert any("the padding token '!' among their labels" in what for what in levels)


def test_padding_that_is_eos_is_named() -> None:
    assert findings([row(chatml())], chatml()) == [
        ("note", "padding and EOS are the same token '<|im_end|>'")
    ]


def test_labels_are_built_from_masks_and_streams_are_looked_at() -> None:
    tokenizer = separate_padding(chatml())
    ids, mask = render_with_mask(tokenizer, CHAT)
    good = {"input_ids": ids, "assistant_masks": mask, "completion_mask": [1] * len(ids)}
    assert findings([good], tokenizer) == []
    bad = dict(good, completion_mask=[int(t != tokenizer.eos_token_id) for t in ids])
    stream = IterableDataset.from_generator(lambda: iter([bad]))
    assert [f.level for f in special_token_findings(stream, tokenizer)] == ["error"]
