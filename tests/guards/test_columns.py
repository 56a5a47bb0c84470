"""A missing column is named with the columns that are there, before a model is loaded."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

import fastpost
from fastpost.guards.columns import column_names, require_columns


def test_likely_misspelling_is_pointed_out() -> None:
    with pytest.raises(ValueError, match=r"DPO needs the columns chosen\+rejected; .*'reject'.*"):
        require_columns(["prompt", "chosen", "reject"], [["chosen", "rejected"]], "DPO")
    with pytest.raises(ValueError, match="rename 'reject' to 'rejected'"):
        require_columns(["prompt", "chosen", "reject"], [["chosen", "rejected"]], "DPO")


def test_any_of_the_choices_will_do() -> None:
    require_columns(["text"], [["text"], ["prompt", "completion"]], "SFT")
    require_columns(["prompt", "completion", "id"], [["text"], ["prompt", "completion"]], "SFT")


def test_columns_of_a_stream_come_from_its_first_row() -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"a": 1, "b": 2}]))
    assert set(column_names(stream)) == {"a", "b"}


@pytest.mark.parametrize(
    ("trainer", "config", "method"),
    [
        (fastpost.SFTTrainer, fastpost.SFTConfig, "SFT"),
        (fastpost.DPOTrainer, fastpost.DPOConfig, "DPO"),
    ],
)
def test_trainers_look_before_loading_the_model(trainer, config, method, tmp_path) -> None:
    """The model does not exist: the data set is what gets complained about."""
    args = config(str(tmp_path), use_cpu=True, bf16=False)
    data = Dataset.from_list([{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match=rf"{method} needs the columns .*'question', 'answer'"):
        trainer("/no/such/model", args=args, train_dataset=data)
    empty = Dataset.from_list([{"text": "a", "chosen": "b", "rejected": "c"}]).select([])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        trainer("/no/such/model", args=args, train_dataset=empty)
