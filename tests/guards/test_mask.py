"""Scored share, truncation and rows without a label are counted before the first step."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

import fastpost
from fastpost.guards.mask import count_mask, show_row
from tests.trainers.conftest import *  # noqa: F403  fixtures: model, tokenizer, data, run_trainer


def rows(*label_masks: str) -> Dataset:
    """Each row a string: '.' masked, 'x' scored."""
    return Dataset.from_list(
        [
            {
                "input_ids": list(range(10, 10 + len(mask))),
                "labels": [i + 10 if c == "x" else -100 for i, c in enumerate(mask)],
            }
            for mask in label_masks
        ]
    )


def test_counts_after_truncation(tokenizer) -> None:
    report = count_mask(rows("....xx", "..xx", "....."), 4, "keep_start", True, tokenizer)
    assert (report.rows, report.tokens, report.scored) == (3, 12, 2)
    assert report.truncated == 2 and report.unlabelled == 2
    assert report.lengths[-1] == 6
    assert "16.7% scored" in str(report)
    other_end = count_mask(rows("....xx", "..xx", "....."), 4, "keep_end", True, tokenizer)
    assert other_end.scored == 4 and other_end.unlabelled == 1


def test_nothing_scored_is_an_error_with_an_example(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no token .* would be scored(.|\n)*First row"):
        count_mask(rows("....", ".."), None, "keep_start", True, tokenizer)


def test_everything_scored_is_an_error_where_prompts_should_be_masked(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"every token .* although its prompts(.|\n)*\[\["):
        count_mask(rows("xxxx", "xx"), None, "keep_start", True, tokenizer)
    assert count_mask(rows("xxxx"), None, "keep_start", False, tokenizer).scored == 3


def test_a_stream_is_sampled_and_says_so(tokenizer) -> None:
    data = rows("..xx", "..xx")
    stream = IterableDataset.from_generator(lambda: iter(data))
    report = count_mask(stream, None, "keep_start", True, tokenizer)
    assert report.is_sample and str(report).startswith("the first 2 rows")


def test_scored_stretches_are_bracketed(tokenizer) -> None:
    ids = tokenizer("ab cd")["input_ids"]
    labels = [-100, -100, -100, *ids[3:]]
    assert show_row({"input_ids": ids, "labels": labels}, tokenizer) == "ab [[cd]]"


def test_trainer_reports_its_data(model, prompt_completion_data, run_trainer) -> None:
    trainer = run_trainer(
        fastpost.SFTTrainer,
        fastpost.SFTConfig,
        model,
        prompt_completion_data,
        max_steps=1,
        max_length=60,
    )
    report = trainer.mask_reports["train"]
    assert report.rows == len(prompt_completion_data) and report.truncated > 0
    assert report.unlabelled == len(prompt_completion_data) - len(trainer.train_dataset)


def test_trainer_refuses_data_that_truncation_leaves_unscored(
    model, prompt_completion_data, run_trainer
) -> None:
    with pytest.raises(ValueError, match=r"no token .*max_length \(8\)"):
        run_trainer(
            fastpost.SFTTrainer, fastpost.SFTConfig, model, prompt_completion_data, max_length=8
        )
